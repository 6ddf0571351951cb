"""``roadwork-dist select-views``: teach a run which crops are worth the backbone."""

from collections.abc import Sequence
from pathlib import Path

from roadwork_dist.cli.arguments import Parser
from roadwork_dist.cli.runs import run_folder


def run(arguments: Sequence[str]) -> int:
    """Write ``selector.safetensors`` beside the run's best weights and print how well it knows the gates."""
    parser = Parser(
        "roadwork-dist select-views",
        "Train a small scorer that tells from the global view of a photo which crops are worth looking at, "
        "from the gates that the run's model has on its training photos. `predict` and `evaluate` then take "
        "--views.select CROPS, and only so many crops go through the backbone. Paths of the run's "
        "config.yaml start from the present folder.",
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
        f"learned from {figures.photos:,} training photos; {figures.held_out:,} others said when to stop:\n"
        f"  divergence from what the gates say: {figures.divergence:.4f} nats, of one fixed order of crops: "
        f"{figures.divergence_of_order:.4f}\n"
        "  share of the gates' contrast that a choice of crops holds:\n"
        "  crops   chosen   fixed order   best possible"
    )
    for count, (chosen, order, best) in figures.captured.items():
        print(f"  {count:>5}   {chosen:6.3f}   {order:11.3f}   {best:13.3f}")
    print(f"selector: {distilled.path}")
    return 0
