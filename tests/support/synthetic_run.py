"""Synthetic predictions, history and views that look like those of a real run."""

import math
from typing import Any

import numpy as np
import pandas as pd

from roadwork_dist.common.random import generator_for
from roadwork_dist.config.batch import DAYTIME, SCENE, WEATHER
from roadwork_dist.evaluation.predictions import as_predictions

CITIES = ((41.88, -87.63), (29.76, -95.37), (40.71, -74.01), (34.05, -118.24), (47.61, -122.33))


def synthetic_predictions(rows: int, split: str = "val", seed: int = 0, skill: float = 2.2) -> pd.DataFrame:
    """Rows of predictions whose logit is the label plus noise; 60 % of the metadata is null."""
    generator = generator_for(seed, split)
    return as_predictions(pd.DataFrame([_row(generator, i, split, skill) for i in range(rows)]))


def _row(generator: np.random.Generator, number: int, split: str, skill: float) -> dict[str, Any]:
    label = int(generator.random() < 0.45)
    logit = float((label - 0.5) * skill * 2 + generator.normal() * 1.5)
    gates = generator.beta(2, 3, size=12)
    gates[np.argsort(gates)[:4]] = 0.0
    latitude, longitude = CITIES[generator.integers(5)]
    known = generator.random(4) < 0.4
    return {
        "id": f"{split}/{number:05d}.jpg",
        "split": split,
        "label": label,
        "logit_0": -logit / 2,
        "logit_1": logit / 2,
        "probability": 1 / (1 + math.exp(-logit)),
        "view_gates": gates.tolist(),
        "latitude": latitude + generator.normal() * 0.4 if known[0] else math.nan,
        "longitude": longitude + generator.normal() * 0.4 if known[0] else math.nan,
        "weather": str(generator.choice(WEATHER)) if known[1] else None,
        "daytime": str(generator.choice(DAYTIME)) if known[2] else None,
        "scene": str(generator.choice(SCENE)) if known[3] else None,
        "width": 4032 if number % 3 else 2016,
        "height": 3024 if number % 3 else 1512,
    }


def synthetic_history(epochs: int = 12, steps: int = 24) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl`` of a run that learns, with one skipped step."""
    generator = generator_for("history")
    lines: list[dict[str, Any]] = []
    for step in range(1, epochs * steps + 1):
        done = step / (epochs * steps)
        loss = 0.62 * math.exp(-3 * done) + 0.12 + 0.03 * generator.normal()
        parts = {"focal": 0.4, "consistency": 0.1, "weather": 0.35, "dice": 0.15}
        line = {"kind": "train", "step": step, "epoch": (step - 1) // steps, "loss": loss}
        line |= {
            f"loss/{name}": loss * share * (1 + 0.1 * generator.normal()) for name, share in parts.items()
        }
        line |= {"lr": 3e-4 * min(step / 30, 0.5 + 0.5 * math.cos(math.pi * done)), "grad_norm": 1.1}
        line |= {"samples_per_s": 41.5, "data_wait": 0.043, "memory_mb": 1840.2}
        lines.append(line if step != 100 else {**line, "kind": "skip", "loss": "nan", "samples": ["a"]})
        if step % steps == 0:
            mcc = 0.9 - 0.8 * math.exp(-4 * done) + 0.02 * generator.normal()
            line = {"kind": "val", "step": step, "epoch": (step - 1) // steps, "loss": loss * 0.9 + 0.05}
            lines.append({**line, "mcc": mcc, "accuracy": 0.5 + mcc / 2, "seconds": 2.0})
    return lines


def synthetic_views(name: str, views: int = 12, side: int = 160) -> np.ndarray[Any, Any]:
    """Views [V, 3, S, S] uint8 of a made-up street, another one for every name."""
    generator = generator_for("views", name)
    y, x = np.mgrid[0:side, 0:side] / side
    out = np.zeros((views, 3, side, side))
    for view in range(views):
        sky, road = generator.uniform(120, 220, 3), generator.uniform(60, 110, 3)
        horizon = 0.4 + 0.1 * generator.normal()
        out[view] = np.where(y > horizon, road[:, None, None] + 20 * x, sky[:, None, None] - 40 * y)
        cone = (np.abs(x - generator.uniform(0.2, 0.8)) < (y - 0.5) * 0.15) & (y < 0.85)
        out[view] = np.where(cone, np.array([235, 105, 25])[:, None, None], out[view])
    return np.clip(out + generator.normal(size=out.shape) * 6, 0, 255).astype(np.uint8)
