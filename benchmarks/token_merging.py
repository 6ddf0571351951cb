"""Effect of token merging: time (CPU time without a GPU), operations, and similarity of the features.

Weights are random unless ``--backbone`` is a local folder or a hub id whose weights are available. With
random weights times and operations are those of the real network, but the similarity says little, because
which tokens are similar, and how the network uses them, is learned.

    python benchmarks/token_merging.py [--backbone dinov3_vits16] [--size 512] [--shares 0.25 0.5 0.75]
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from measuring import alternate, heading, median_and_spread, ratios
from torch import Tensor
from torch.nn import functional as F

from roadwork_dist.config.experiment import BackboneConfig
from roadwork_dist.detector.backbone import BACKBONES, Backbone, build_random, load_backbone


def load(name: str, share: float, device: torch.device) -> Backbone:
    """A backbone that merges this share of tokens; the same weights for every share."""
    if name in BACKBONES:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return build_random(name, device=device, dtype=dtype, attention="sdpa", token_merging=share)
    return load_backbone(BackboneConfig(name=name, token_merging=share, dtype="fp32"), device=device)


def photo_views(count: int, size: int) -> Tensor:
    """Squares cut from the two sample photographs of scikit-learn, [N, 3, S, S] uint8."""
    from sklearn.datasets import load_sample_images

    views = []
    for number in range(count):
        photo = torch.from_numpy(load_sample_images().images[number % 2].copy()).permute(2, 0, 1)
        start = (number // 2 * 53) % (photo.shape[2] - photo.shape[1])
        square = photo[None, :, :, start : start + photo.shape[1]].float()
        views.append(F.interpolate(square, size=(size, size), mode="bicubic", antialias=True)[0])
    return torch.stack(views).clamp(0, 255).to(torch.uint8)


def table(backbones: dict[float, Backbone], views: Tensor, turns: int) -> str:
    """Milliseconds, operations and similarity by share, as Markdown."""
    size = views.shape[-1]

    def run(share: float) -> Callable[[], object]:
        def forward() -> None:
            backbones[share](views)
            if views.is_cuda:
                torch.cuda.synchronize()

        return forward

    clock = time.perf_counter if views.is_cuda else time.process_time
    times = alternate({str(share): run(share) for share in backbones}, turns, clock)
    whole = backbones[0.0](views)
    least = backbones[0.0].forward_operations(size)
    lines = [
        "| share merged | ms a view | IQR | speed | operations | cosine similarity: mean | worst |",
        "|--:" * 7 + "|",
    ]
    for share, backbone in backbones.items():
        ms = [1000 * t / len(views) for t in times[str(share)]]
        speed = median(ratios(times, "0.0", str(share)))
        operations = backbone.forward_operations(size) / least
        likeness = F.cosine_similarity(whole, backbone(views))
        cells = [f"{share:g}", median_and_spread(ms, digits=0), f"{speed:.2f}", f"{operations:.2f}"]
        cells += [f"{likeness.mean():.4f}", f"{likeness.min():.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backbone", default="dinov3_vits16", help="(default: %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="side of a view in px (%(default)s)")
    parser.add_argument("--views", type=int, default=2, help="views at a time (%(default)s)")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--turns", type=int, default=5, help="turns of the clock (%(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(heading("transformers"))
    weights = "random weights" if options.backbone in BACKBONES else "its own weights"
    print(f"{options.backbone}, {weights}, {options.views} views of {options.size} px, {device.type}\n")
    backbones = {share: load(options.backbone, share, device) for share in [0.0, *options.shares]}
    print(table(backbones, photo_views(options.views, options.size).to(device), options.turns))
    return 0


if __name__ == "__main__":
    sys.exit(main())
