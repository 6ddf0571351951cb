"""Presets, YAML files and dotted overrides."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.common.yaml import to_yaml
from roadwork_dist.config.experiment import ExperimentConfig
from roadwork_dist.config.io import (
    load_experiment,
    parse_experiment,
    presets,
    resolve_config,
    setting_names,
)

# The surface of the command line. Renaming or removing a line breaks the files and scripts of users:
# change this list on purpose, and say so in the CHANGELOG.
SETTINGS = """
output_dir resume seed epochs batch_size accumulation batch_size_search workers precision compile
compile_regions monitor
patience
max_nonfinite_steps hang_timeout device
spike spike.action spike.window spike.threshold
optim optim.name optim.lr optim.betas optim.eps optim.weight_decay optim.layer_decay optim.clip
schedule schedule.name schedule.warmup_steps schedule.final_ratio schedule.decay_share
ema ema.enabled ema.decay ema.warmup
checkpoint checkpoint.every_steps checkpoint.keep checkpoint.asynchronous
tracking tracking.tensorboard tracking.progress tracking.health_every
tracking.wandb tracking.wandb.mode tracking.wandb.project tracking.wandb.entity
data data.train data.val data.target data.val_share data.folds data.image_root
data.max_unreadable_share data.max_pixels data.text_encoder
data.order data.shuffle_shards data.remote data.remote.cache_dir data.remote.cache_gb
data.remote.read_ahead data.remote.attempts data.remote.timeout
data.columns data.columns.id data.columns.image data.columns.label data.columns.latitude
data.columns.longitude data.columns.weather data.columns.daytime data.columns.scene
data.columns.description data.columns.mask data.columns.group
views views.size views.policy views.grid views.scale views.quality views.decoder views.select
augment augment.enabled augment.strength augment.policy augment.copies augment.mix
augment.mix_alpha augment.mix_share
gps gps.enabled gps.clusters gps.near_weight gps.min_share_100km gps.on_shortfall
backbone backbone.name backbone.trainable backbone.last_n backbone.dtype backbone.attention
backbone.gradient_checkpointing backbone.token_merging
features features.mode features.dir features.dtype features.batch_views features.on_device
model model.width model.prune_keep model.pyramid model.layers model.heads model.kv_heads model.gate
model.experts model.ffn_ratio model.view_fusion model.metadata model.metadata_dropout model.dropout
model.mask_head
loss loss.weights loss.gamma loss.alpha loss.label_smoothing loss.balance
eval eval.bootstrap eval.worst eval.report
"""


def test_the_names_of_settings_change_only_on_purpose() -> None:
    assert sorted(setting_names(ExperimentConfig)) == sorted(SETTINGS.split())


def test_the_presets_are_there() -> None:
    assert {"demo", "natix_1gpu", "natix_8gpu"} <= presets().keys()


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_loads_and_says_only_what_exists(name: str) -> None:
    config = parse_experiment(["--config", name])
    assert config == load_experiment(presets()[name])
    for section, value in yaml.safe_load(presets()[name].read_text()).items():
        names = [f"{section}.{key}" for key in value] if isinstance(value, dict) else [section]
        assert set(names) <= set(setting_names(ExperimentConfig))


def test_both_natix_presets_train_with_the_same_effective_batch() -> None:
    one, eight = parse_experiment(["--config", "natix_1gpu"]), parse_experiment(["--config", "natix_8gpu"])
    assert one.batch_size * one.accumulation == eight.batch_size * eight.accumulation * 8 == 64


def test_no_arguments_mean_the_demo() -> None:
    assert parse_experiment([]) == parse_experiment(["--config=demo"])


@pytest.mark.parametrize("name", sorted(presets()))
def test_yaml_reads_back_as_the_same_settings(name: str, tmp_path: Path) -> None:
    config = replace(parse_experiment(["--config", name]), seed=7)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_experiment(path) == config
    assert parse_experiment([f"--config={path}"]) == config


def test_a_file_alone_starts_from_the_defaults_not_from_the_demo(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("optim: {lr: 1e-4}\n")  # YAML 1.1 reads 1e-4 as text
    config = load_experiment(path)
    assert config.optim.lr == 1e-4
    assert config == ExperimentConfig(optim=config.optim)


def test_dotted_overrides_are_typed_and_the_last_one_wins() -> None:
    words = (
        "--optim.lr 1e-4 --epochs 3 --optim.betas [0.8,0.95] --data.val null --views.size 256"
        " --tracking.wandb.mode offline --augment.enabled false --model.kv_heads 4 --epochs 4"
        " --output_dir here --model.mask_head off"
    )
    config = parse_experiment(words.split())
    assert config.optim.lr == 1e-4
    assert config.epochs == 4
    assert config.optim.betas == (0.8, 0.95)
    assert config.data.val is None
    assert config.views.size == 256
    assert config.tracking.wandb.mode == "offline"
    assert config.augment.enabled is False
    assert config.model.kv_heads == 4
    assert config.output_dir == "here"
    assert config.model.mask_head == "off"
    # What was not named stays as the preset says.
    assert config.schedule == parse_experiment([]).schedule


def test_a_config_behind_an_option_does_not_undo_it(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / f"{name}.yaml").write_text(f"epochs: 9\noutput_dir: {name}\n")
    configs = [f"--config={tmp_path / 'first.yaml'}", "--config", str(tmp_path / "second.yaml")]
    for words in ([configs[0], "--epochs=2", *configs[1:]], ["--epochs=2", *configs]):
        config = parse_experiment(words)
        assert (config.epochs, config.output_dir) == (2, "second")


@pytest.mark.parametrize(
    ("words", "name", "nearest"),
    [
        (["--epoch", "3"], "epoch", "epochs"),  # no abbreviations
        (["--epochss=3"], "epochss", "epochs"),
        (["--optim.lrr", "1"], "optim.lrr", "optim.lr"),
        (["--optm.lr", "1"], "optm.lr", "optim.lr"),
        (["--tracking.wandb.mod", "offline"], "tracking.wandb.mod", "tracking.wandb.mode"),
        (["--wandb.mode", "offline"], "wandb.mode", "tracking.wandb.mode"),
        (["--conf", "demo"], "conf", "config"),
        (["--optim", "{lrr: 1}"], "optim.lrr", "optim.lr"),
    ],
)
def test_unknown_options_are_fatal_with_the_nearest_name(words: list[str], name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown setting '{name}': did you mean '{nearest}'"):
        parse_experiment(words)


@pytest.mark.parametrize(
    ("text", "name", "nearest"),
    [
        ("epoch: 3", "epoch", "epochs"),
        ("optim: {lrr: 1}", "optim.lrr", "optim.lr"),
        ("tracking: {wandb: {moode: offline}}", "tracking.wandb.moode", "tracking.wandb.mode"),
    ],
)
def test_unknown_keys_of_a_file_are_fatal_with_the_nearest_name(
    text: str, name: str, nearest: str, tmp_path: Path
) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"unknown setting '{name}': did you mean '{nearest}'"):
        load_experiment(path)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--optim.lr fast", "optim.lr is 'fast', expected float"),
        ("--epochs 1.5", "epochs is '1.5', expected int"),
        ("--optim.betas [0.9]", "optim.betas is '[0.9]', expected tuple with 2 elements"),
        ("--views.size big", "views.size is 'big', expected int, 'auto'"),
        ("--model.kv_heads x", "model.kv_heads is 'x', expected int, null"),
        ("--resume maybe", "resume is 'maybe', expected 'auto', 'never'"),
        ("--tracking.progress 2", "tracking.progress is '2', expected bool"),
        ("--optim.lr -1", "optim.lr is -1.0, expected a number > 0"),
        ("--backbone.trainable all --features.mode cached", "set features.mode to online"),
        ("stray", "unrecognized arguments: stray"),
    ],
)
def test_wrong_values_are_one_line_with_what_was_expected(words: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_experiment(words.split())
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a: [", "own.yaml cannot be read as YAML"),
        (b"\xff\xfe\x00", "own.yaml cannot be read as YAML"),
        (b"", "own.yaml contains no settings"),
        (b"- 1", r"own.yaml contains no settings: expected lines like `epochs: 3`, got \[1\]"),
        (b"epochs: many", "epochs is 'many', expected int"),
        (b"optim: 4", "own.yaml: optim is 4, expected settings below it, such as `optim: {name: …}`"),
        (b"tracking: {wandb: offline}", "tracking.wandb is 'offline', expected settings below it"),
        (b"data:", "data is None, expected settings below it"),
    ],
)
def test_a_broken_file_is_named(content: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=told):
        load_experiment(path)


def test_a_config_that_is_neither_a_file_nor_a_preset_is_told() -> None:
    with pytest.raises(ConfigError, match="did you mean 'natix_1gpu'"):
        resolve_config("natix_1gp")
    with pytest.raises(ConfigError, match="neither a file nor a preset"):
        parse_experiment(["--config"])


def test_what_print_config_prints_reads_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--config", "natix_1gpu", "--optim.lr", "2e-4", "--views.size", "256"]
    with pytest.raises(SystemExit) as left:
        parse_experiment([*words, "--print_config"])
    assert left.value.code == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_experiment(path) == parse_experiment(words)


def test_help_describes_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_experiment(["--help"])
    text = capsys.readouterr().out
    groups = {name.rsplit(".", 1)[0] for name in setting_names(ExperimentConfig) if "." in name}
    missing = [
        name for name in setting_names(ExperimentConfig) if name not in groups and f"--{name}" not in text
    ]
    assert not missing
    assert "Decoupled weight decay; none on biases" in " ".join(text.split())
