"""``roadwork-dist select-views``: trains a scorer that selects crops for the backbone."""

from collections.abc import Sequence
from pathlib import Path

from roadwork_dist.cli.arguments import Parser
from roadwork_dist.cli.runs import run_folder


def run(arguments: Sequence[str]) -> int:
    """Write ``selector.safetensors`` next to the best weights and print how well it predicts the gates."""
    parser = Parser(
        "roadwork-dist select-views",
        "Train a small scorer that predicts from the global view of a photo which crops matter. It learns "
        "from the gates of the run's model on its training photos. `predict` and `evaluate` then accept "
        "--views.select CROPS, and only that many crops go through the backbone. Relative paths in the run's "
        "config.yaml start from the current folder.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder, or its best/")
    options = parser.parse(arguments)
    folder = run_folder(options.run)
    from roadwork_dist.cli.logs import set_up_logging
    from roadwork_dist.recipes.select_views import train_view_selector

    set_up_logging()
    distilled = train_view_selector(folder)
    figures = distilled.figures
    print(
        f"trained on {figures.photos:,} photos, with early stopping on {figures.held_out:,} held-out ones:\n"
        f"  divergence from the gates: {figures.divergence:.4f} nats; for one fixed order of crops: "
        f"{figures.divergence_of_order:.4f}\n"
        "  share of the gates' contrast covered by the chosen crops:\n"
        "  crops   chosen   fixed order   best possible"
    )
    for count, (chosen, order, best) in figures.captured.items():
        print(f"  {count:>5}   {chosen:6.3f}   {order:11.3f}   {best:13.3f}")
    print(f"selector: {distilled.path}")
    return 0
