"""Recipes load, replay and override; what cannot run is refused in one line."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sngpt_jax.config import (
    Config,
    ConfigError,
    Level,
    OptimConfig,
    TrainConfig,
    changed,
    differences,
    format_levels,
    microbatches,
    parse_levels,
    to_json,
)
from sngpt_jax.config import file as config_file
from sngpt_jax.config.checks import validate
from sngpt_jax.config.recipe import Overrides, load, parse_command, recipe_name

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.py"))
GOOD = Config(optim=OptimConfig(warmdown_steps=100))


@dataclass(frozen=True)
class Arguments:
    config: str
    overrides: Overrides


def parse(*argv):
    return parse_command(Arguments, argv, program="test", description="A command.").overrides


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_by_path_and_by_name_and_says_what_it_is(path, monkeypatch, tmp_path):
    assert load(str(path)) == load(path.stem)
    assert "launch.sh train --config" in path.read_text()
    monkeypatch.chdir(tmp_path)
    assert load(path.stem) == load(str(path))


@pytest.mark.parametrize("given", [["-tokens", "auto"], ["_tokens=auto"], ["-tokens=0"]])
def test_automatic_microbatches_are_a_word_on_the_command_line(given):
    option, *value = given
    argv = ["--config", "quickstart", f"--train.device-batch{option}", *value]
    assert parse(*argv, "--data.source", "auto").train.device_batch_tokens == 0


def test_a_run_replays_from_its_json(tmp_path):
    config = parse("--config", "quickstart", "--train.steps", "7", "--model.rope-base", "5000")
    file = tmp_path / "config.json"
    file.write_text(to_json(config))
    assert parse("--config", str(file)) == config
    assert differences(load("quickstart"), config) == [
        "model.rope_base: 10000.0 -> 5000.0",
        f"train.steps: {load('quickstart').train.steps} -> 7",
    ]


def test_names_of_runs(tmp_path):
    assert recipe_name("quickstart") == recipe_name("configs/quickstart.py") == "quickstart"
    assert recipe_name(str(tmp_path / "mine" / "config.json")) == "mine-replay"


SPARSE = {"family": "pre_norm"}  # at width 512

# by section, the fields that are changed in GOOD, and what the message names
IMPOSSIBLE = {
    "model": [
        ({"num_heads": 3}, "model.d_model = 512|model.num_heads = 3"),
        ({"d_model": 24, "num_heads": 8}, "model.d_model / model.num_heads = 3"),
        ({"num_kv_heads": 3}, "model.num_heads = 8|model.num_kv_heads = 3"),
        ({"num_layers": 0}, "model.num_layers = 0"),
        ({"max_seq_len": 512}, "data.seq_len = 1024|model.max_seq_len = 512"),
        ({"norm_eps": math.nan}, "model.norm_eps"),
        ({"rope_base": 0.0}, "model.rope_base"),
        ({"levels": "9,4,0"}, "model.levels = '9,4,0'|model.family = compact"),
        ({"positions": "learned"}, "model.positions|model.family = compact"),
        (SPARSE | {"generators": "prefix"}, "model.generators|model.levels"),
        (SPARSE | {"forward_standardized": False}, "forward_standardized|model.levels"),
        (SPARSE | {"smear": "after_norm"}, "model.smear|model.family = pre_norm"),
        (SPARSE | {"levels": "10,4,0"}, "model.levels|model.d_model = 512|n = 10"),
        (SPARSE | {"levels": "9,600,0"}, "model.levels|k = 600"),
        (SPARSE | {"levels": "9,16,0;12,32,24"}, "model.levels|degree 24"),
        (SPARSE | {"levels": "9,16,0;19,32,1024"}, "model.levels|n = 19"),
        (SPARSE | {"positions": "learned", "rope_dims": 16}, "model.rope_dims|model.positions"),
        ({"matrix_init_std": -0.1}, "model.matrix_init_std"),
        ({"attention": "cudnn", "compute_dtype": "float32"}, "model.attention|model.compute_dtype"),
        (
            {"attention": "tokamax", "compute_dtype": "float32"},
            "model.attention|model.compute_dtype",
        ),
        ({"vocab_size": 70_000}, "model.vocab_size = 70000"),
        ({"max_seq_len": 2**20 + 1, "num_layers": 257}, "1048577 exceeds|model.num_layers"),
        ({"recycle_layers": (0,) * 257}, "model.recycle_layers has 257 entries"),
        ({"recycle_layers": (-1,)}, "model.recycle_layers"),
        ({"num_kv_heads": 3, "rope_base": 0.0}, "model.num_heads|model.rope_base"),
    ],
    "optim": [
        ({"adam_final_lr_fraction": 1.5}, "optim.adam_final_lr_fraction = 1.5"),
        ({"warmdown_fraction": 0.5}, "optim.warmdown_steps|optim.warmdown_fraction"),
        ({"schedule": "constant"}, "optim.schedule|optim.warmdown_steps"),
        ({"warmdown_clock": "wall_clock"}, "optim.warmdown_clock|train.max_seconds"),
        ({"muon_momentum": 1.0}, "optim.muon_momentum"),
    ],
    "data": [
        ({"batch_tokens": 524_289}, "data.batch_tokens = 524289|data.slices|data.seq_len"),
        ({"dir": "~/data"}, "data.dir = ~/data|whole path"),
    ],
    "train": [
        ({"fsdp": 0}, "train.fsdp = 0"),
        ({"seed": 2**32}, "train.seed = 4294967296 exceeds 4294967295"),
        ({"device_batch_tokens": 512}, "train.device_batch_tokens = 512|data.seq_len = 1024"),
        ({"profile_steps": "8:5"}, "train.profile_steps = '8:5'"),
        ({"profile_steps": "5-8"}, "train.profile_steps"),
        ({"profile_steps": "0:3"}, "train.profile_steps"),
        ({"profile_steps": "3:20001"}, "train.profile_steps|train.steps = 20000"),
        ({"steps": 50}, "optim.warmdown_steps|train.steps = 50"),
        ({"max_seconds": -1.0}, "train.max_seconds"),
        ({"xla_options": ("xla_dump_to=x",)}, "xla_dump_to=x|XLA_FLAGS"),
        ({"xla_options": ("xla_gpu_x=/tmp/y",)}, "names files"),
        ({"xla_options": ("xla_gpu_target_config_filename=x",)}, "names files"),
        ({"xla_options": ("xla_backend_extra_options=x",)}, "names files"),
    ],
    "eval": [({"tokens": 5}, "eval.tokens = 5")],
    "export": [({"gptq": True, "gptq_tokens": 9}, "export.gptq_tokens = 9|data.seq_len = 1024")],
}


@pytest.mark.parametrize(
    ("section", "fields", "named"),
    [(section, *case) for section, cases in IMPOSSIBLE.items() for case in cases],
)
def test_an_impossible_combination_names_its_fields(section, fields, named):
    if "levels" in fields:
        fields = fields | {"levels": parse_levels(fields["levels"])}
    with pytest.raises(ConfigError) as error:
        validate(changed(GOOD, **{section: fields}))
    assert [name for name in named.split("|") if name not in str(error.value)] == []
    assert "\n" not in str(error.value)


def test_gradients_in_no_fixed_order_are_not_deterministic():
    with pytest.raises(
        ConfigError, match="model.attention = fa4_jax .* train.deterministic = True"
    ):
        validate(changed(GOOD, model={"attention": "fa4_jax"}, train={"deterministic": True}))


def test_levels_are_a_text_on_the_command_line():
    two = load("cayley_small_2l").model
    assert two.levels == (Level(10, 16, 0), Level(15, 32, 256))
    dense = load("cayley_small_dense").model
    for text, model in (("", dense), (format_levels(two.levels), two)):
        assert parse("--config", "cayley_small_3l", "--model.levels", text).model == model


@pytest.mark.parametrize("text", ["9,4", "9,4,0;", "9,4,x", "9,4,0,1"])
def test_levels_of_another_form_name_the_right_one(text):
    with pytest.raises(ConfigError, match=f"model.levels = '{text}' .*n,k,degree"):
        parse_levels(text)


def test_levels_are_read_from_older_files_and_recipes_too(tmp_path):
    """Earlier versions wrote them as a text."""
    config = load("cayley_small_3l")
    values = json.loads(to_json(config))
    assert values["model"]["levels"] == [list(level) for level in config.model.levels]
    values["model"]["levels"] = format_levels(config.model.levels)
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert load(str(tmp_path / "config.json")) == config
    (tmp_path / "mine.py").write_text(
        (ROOT / "configs/cayley_small_3l.py").read_text()
        + "from sngpt_jax.config import changed\n"
        + "config = changed(config, model={'levels': '10,16,0'})\n"
    )
    assert load(str(tmp_path / "mine.py")).model == load("cayley_small_1l").model


def test_the_small_sparse_models_differ_in_their_levels_alone():
    small = load("cayley_small_3l")
    for name, fields in (
        ("cayley_small_2l", ["model.levels"]),
        ("cayley_small_dense", ["model.levels"]),
        ("cayley_small_1l", ["model.levels", "train.steps"]),
    ):
        assert [line.split(":")[0] for line in differences(small, load(name))] == fields


# section, field, value; None: the field or section is missing
@pytest.mark.parametrize(
    ("section", "field", "value", "said"),
    [
        ("model", "num_layer", 3, "unknown key 'num_layer'; did you mean 'num_layers'"),
        ("model", "num_layers", "9", "model.num_layers: expected int, found '9' of type str"),
        ("model", "num_layers", True, "model.num_layers: expected int, found True of type bool"),
        ("model", "num_layers", 9.0, "model.num_layers: expected int, found 9.0 of type float"),
        ("model", "attention", "flash", "model.attention: expected one of auto, xla, cudnn, "),
        ("model", "attention", ["xla"], "model.attention"),
        ("model", "levels", [[9, 4]], "model.levels[0]: expected a list of n, k, degree, found"),
        ("model", "levels", [[9, 4, "0"]], "model.levels[0]: expected int"),
        ("model", "levels", "9,4", "model.levels = '9,4'"),
        ("model", None, [], "model: expected an object, found list"),
        ("train", None, None, "missing train"),
        ("model", "d_model", None, "missing model.d_model"),
        ("format", None, 2, "expected a configuration of format 1, found 2"),
        ("format", None, "1", "expected a configuration of format 1, found '1'"),
        ("train", "steps", 2**63, "9223372036854775808' is not an integer of 64 bits"),
        ("train", "steps", 2**60, "train.steps = 1152921504606846976 exceeds"),
        ("data", "dir", "a\0b", r"data.dir = 'a\x00b' holds a control character"),
        ("eval", "sample_prompt", "\x1b[2J", r"eval.sample_prompt = '\x1b[2J' holds a control"),
        ("train", "xla_options", ["a=\x9b"], r"train.xla_options = ('a=\x9b',) holds a control"),
        ("data", "dir", "x" * 70_000, "data.dir has 70000 characters"),
        ("model", "norm_eps", math.inf, "no finite number"),
    ],
)
def test_a_broken_json_is_one_line(section, field, value, said, tmp_path):
    values = json.loads(to_json(GOOD))
    where, name = (values[section], field) if field else (values, section)
    where[name] = value
    if value is None:
        del where[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError) as error:
        config_file.read(tmp_path / "config.json")
    assert said in str(error.value)


def test_an_older_runs_json_takes_the_defaults_of_what_it_lacks_and_says_so(tmp_path, caplog):
    values = json.loads(to_json(changed(GOOD, train={"seed": 5})))
    del values["format"], values["train"]["xla_options"], values["optim"]["ema_decay"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with caplog.at_level("INFO", "sngpt_jax"):
        assert config_file.read(tmp_path / "config.json") == changed(GOOD, train={"seed": 5})
    (line,) = caplog.messages
    assert line.endswith("defaults taken for optim.ema_decay, train.xla_options")


def test_a_json_does_not_choose_where_compiled_programs_are_kept(tmp_path):
    """XLA runs what it finds there."""
    for folder, kept in (("/elsewhere", TrainConfig().compilation_cache), ("", "")):
        config = changed(GOOD, train={"compilation_cache": folder})
        (tmp_path / "config.json").write_text(to_json(config))
        assert load(str(tmp_path / "config.json")).train.compilation_cache == kept


def test_integers_serve_as_floats_in_json(tmp_path):
    values = json.loads(to_json(GOOD))
    values["model"]["rope_base"] = 10_000
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert config_file.read(tmp_path / "config.json") == GOOD


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("config = 3", "found int"),
        ("import nothing_of_that_name", "ModuleNotFoundError"),
        ("Config(model=ModelConfig(num_heads=7))", "model.num_heads = 7"),
        ("syntax error", "SyntaxError"),
        ("import sys\nsys.exit(0)", "SystemExit"),
        ("Config(model=ModelConfig(num_layers='2'))", "model.num_layers: expected int"),
        ("Config(model=ModelConfig(num_layers=2.0))", "model.num_layers: expected int"),
        ("Config(eval=None)", "eval: expected an object, found NoneType"),
        ("Config(optim=OptimConfig(newton_schulz_dtype='fp32'))", "expected one of"),
    ],
)
def test_a_broken_recipe_is_one_line(text, said, tmp_path):
    if text.startswith("Config"):
        text = f"from sngpt_jax.config import *\nconfig = {text}"
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ConfigError, match=said):
        load(str(tmp_path / "mine.py"))


def test_an_unknown_recipe_suggests():
    with pytest.raises(ConfigError, match="did you mean quickstart"):
        load("quickstat")


@pytest.mark.parametrize(
    "argv",
    [
        ["--train.stps", "5"],
        ["--train.steps", "five"],
        ["--model.attention", "flash"],
        ["--model.levels", "9,4"],
        ["--model.num-heads", "3"],
        ["--config", "missing.py"],
    ],
)
def test_a_wrong_command_line_names_the_option(argv, capsys):
    config = [] if "--config" in argv else ["--config", "quickstart"]
    with pytest.raises((SystemExit, ConfigError)) as error:
        parse(*config, *argv)
    printed = capsys.readouterr()
    said = printed.out + printed.err + str(error.value)
    assert error.type is ConfigError or error.value.code == 2
    assert argv[0].lstrip("-").split(".")[-1].replace("-", "_") in said.replace("-", "_")


def test_commands_parse_their_options_without_jax():
    code = (
        "import sys, sngpt_jax.plan, sngpt_jax.train, sngpt_jax.base.cli\n"
        "try: sngpt_jax.base.cli.run(sngpt_jax.train.main)\n"
        "except SystemExit as done: sys.exit(done.code + 10 * ('jax' in sys.modules))"
    )
    argv = ["--config", "quickstart", "--train.stps", "5"]
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr + done.stdout


@given(
    sequences=st.integers(1, 64),
    devices=st.integers(1, 8),
    fit=st.integers(1, 16),
    seq_len=st.sampled_from([8, 128]),
)
def test_microbatches_are_equal_and_fit_and_few(sequences, devices, fit, seq_len):
    if sequences % devices:
        with pytest.raises(ConfigError, match=r"do not divide over"):
            microbatches(sequences * seq_len, fit * seq_len, seq_len, devices)
        return
    count = microbatches(sequences * seq_len, fit * seq_len, seq_len, devices)
    per_device = sequences // devices
    assert per_device % count == 0
    assert per_device // count <= fit
    assert not any(per_device % n == 0 and per_device // n <= fit for n in range(1, count))


def test_defaults_are_valid_but_for_the_schedule_they_leave_open():
    assert validate(Config(optim=OptimConfig(schedule="constant")))


def test_every_field_says_what_it_is():
    """A field without a comment beside or above it has no help text."""
    text = (ROOT / "sngpt_jax" / "config" / "fields.py").read_text()
    fields = re.findall(r"^(    # .*\n)?    (\w+): .*?( #.*)?$", text, re.M)
    bare = {name for above, name, beside in fields if not (above or beside)}
    assert len(fields) > 80
    assert bare == {field.name for field in dataclasses.fields(Config)}


def test_a_name_that_config_json_cannot_hold_is_refused():
    with pytest.raises(ConfigError, match="data.dir = a.* is not UTF-8; rename the"):
        validate(changed(GOOD, data={"dir": "a\udcff"}))
