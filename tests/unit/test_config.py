"""Settings: the same keys as flags, environment and YAML, in that order; what is not ours goes to vLLM untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from aurora_vllm import settings as front
from aurora_vllm.config import AuroraConfig
from aurora_vllm.errors import AuroraError, SettingsError
from aurora_vllm.transport.block import POSITIONS

# A value for each key that is not its default, as text.
OTHER: dict[str, str] = {
    "draft": "/some/draft",
    "speculate": "always",
    "objective": "reverse",
    "learner_device": "cpu",
    "cache_dir": "/some/cache",
    "prompt_lookup": "false",
    "learn": "false",
    "learner_sleep": "false",
    "draft_vocab_size": "500",
    "ring_mb": "128",
    "semantics": "aurora-release",
    "sglang_api": "true",
    "sync": "steps",
    "checkpoint_dir": "/some/checkpoints",
    "resume": "latest",
    **{
        name: str(field.default + 1) if isinstance(field.default, int) else str(field.default / 2 or 0.5)
        for name, field in AuroraConfig.model_fields.items()
        if type(field.default) in (int, float)
    },
    "learner_nice": "10",  # its default is the largest value
}


def test_every_field_has_a_test_value() -> None:
    assert set(OTHER) == set(AuroraConfig.model_fields)


def as_flag(name: str, text: str) -> list[str]:
    flag = f"--aurora-{name.replace('_', '-')}"
    if AuroraConfig.model_fields[name].annotation is bool:
        return [flag] if text == "true" else [f"--no-{flag[2:]}"]
    return [flag, text]


@pytest.mark.parametrize("name", AuroraConfig.model_fields)
def test_each_key_is_a_flag_a_variable_and_a_yaml_key(name: str, tmp_path: Path) -> None:
    file = tmp_path / "aurora.yaml"
    file.write_text(f"{name}: {OTHER[name]}\n")
    by_flag = front.parse(as_flag(name, OTHER[name]), {}).config
    by_variable = front.parse([], {f"AURORA_{name.upper()}": OTHER[name]}).config
    by_file = front.parse(["--aurora-config", str(file)], {}).config
    assert by_flag == by_variable == by_file
    assert getattr(by_flag, name) != getattr(AuroraConfig(), name)
    assert by_flag.model_dump() | {name: None} == AuroraConfig().model_dump() | {name: None}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(layers=st.lists(st.sets(st.sampled_from(["seed", "ring_mb", "batch_tokens"])), min_size=3, max_size=3))
def test_flags_override_environment_overrides_file(tmp_path: Path, layers: list[set[str]]) -> None:
    file_keys, variable_keys, flag_keys = layers
    file = tmp_path / "aurora.yaml"
    file.write_text(yaml.safe_dump(dict.fromkeys(file_keys, 101)))
    environment = {f"AURORA_{key.upper()}": "102" for key in variable_keys}
    flags = [word for key in flag_keys for word in as_flag(key, "103")]
    found = front.parse(["--aurora-config", str(file), *flags], environment)
    for key in ("seed", "ring_mb", "batch_tokens"):
        wanted: Any = AuroraConfig.model_fields[key].default
        for layer, value in ((file_keys, 101), (variable_keys, 102), (flag_keys, 103)):
            wanted = value if key in layer else wanted
        assert getattr(found.config, key) == wanted
    assert found.explicit == file_keys | variable_keys | flag_keys


VLLM_WORDS = st.sampled_from(
    ["M", "--port", "80", "-tp", "2", "-O3", "--x={'a': 1}", '{"a": 1}', "--no-x", "-3", "serve", "--aurorae"]
)
AURORA_WORDS = st.sampled_from(
    [["--aurora-seed", "3"], ["--aurora-seed=3"], ["--aurora_seed=-3"], ["--no-aurora-learn"], ["--aurora-plan"]]
)


@given(words=st.lists(st.one_of(VLLM_WORDS.map(lambda word: [word]), AURORA_WORDS)))
def test_what_is_not_ours_stays_in_order(words: list[list[str]]) -> None:
    ours = ("--aurora-", "--aurora_", "--no-aurora-")
    theirs = [word for group in words if not group[0].startswith(ours) for word in group]
    left = front.parse([word for group in words for word in group], {}).vllm_argv
    assert left == (theirs[1:] if theirs[:1] == ["serve"] else theirs)


@pytest.mark.parametrize(
    ("argv", "environment", "line"),
    [
        (["--aurora-rng-mb", "3"], {}, "unknown option --aurora-rng-mb; the nearest is --aurora-ring-mb"),
        (["--no-aurora-lern"], {}, "unknown option --no-aurora-lern; the nearest is --no-aurora-learn"),
        ([], {"AURORA_RNG_MB": "3"}, "unknown environment variable AURORA_RNG_MB; the nearest is AURORA_RING_MB"),
        ([], {"AURORA_RING_MB": "x"}, "AURORA_RING_MB: input should be a valid integer"),
        ([], {"AURORA_OFF": "perhaps"}, "AURORA_OFF: input should be a valid boolean"),
        (["--aurora-ring-mb", "0"], {}, "--aurora-ring-mb: input should be greater than or equal to 1, not '0'"),
        (["--aurora-speculate=never2"], {}, "--aurora-speculate: input should be 'auto', 'always' or 'never'"),
        (["--aurora-ring-mb"], {}, "--aurora-ring-mb: expected one argument"),
        (["--aurora-plan=xml"], {}, "--aurora-plan: takes no value, not 'xml'"),
        (["--aurora-config", "/nowhere.yaml"], {}, "cannot read settings file /nowhere.yaml: No such file"),
    ],
)
def test_wrong_settings_are_one_clear_line(argv: list[str], environment: dict[str, str], line: str) -> None:
    with pytest.raises(AuroraError) as caught:
        front.parse(argv, environment)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "beyond",
    [
        {"rollback_confidence": 1.0},  # a certainty that no number of verdicts gives
        {"weight_average": 1.0},  # nothing would ever be learned
        {"learner_cpu_share": 0.0}, {"learner_least_share": 0.0}, {"replay_passes": 0.0}, {"learning_rate": 0.0},
        {"evidence_tokens": 0},  # a candidate that nobody judged
        {"num_speculative_tokens": 0}, {"num_speculative_tokens": POSITIONS + 1},  # the control block counts no more
        {"learner_nice": -1}, {"learner_nice": 20},
    ],
)  # fmt: skip
def test_what_would_divide_by_zero_or_mean_nothing_is_refused(beyond: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AuroraConfig(**beyond)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("rinng_mb: 3", "unknown key rinng_mb in {file}; the nearest is ring_mb"),
        ("ring-mb: 0", "ring_mb in {file}: input should be greater than or equal to 1, not 0"),
        ("a: [", "settings file {file} is not YAML (line 2, column 1)"),
        ("- a", "settings file {file} is no mapping of keys to values"),
        ("a: \x00", "settings file {file} is not YAML"),
    ],
)
def test_wrong_yaml_is_one_clear_line(text: str, line: str, tmp_path: Path) -> None:
    file = tmp_path / "aurora.yaml"
    file.write_text(text + "\n")
    with pytest.raises(AuroraError) as caught:
        front.parse([], {"AURORA_CONFIG": str(file)})
    assert str(caught.value).startswith(line.format(file=file))


def test_keys_in_vllms_own_file_come_last(tmp_path: Path) -> None:
    vllms, ours = tmp_path / "vllm.yaml", tmp_path / "aurora.yaml"
    vllms.write_text("port: 3\naurora-seed: 101\naurora_ring_mb: 101\naurora-learn: false\n")
    ours.write_text("seed: 102\n")
    for argv in (["M", "--config", str(vllms)], ["M", f"--config={vllms}"]):
        found = front.parse(argv, {})
        assert (found.config.seed, found.config.ring_mb, found.config.learn) == (101, 101, False)
        assert (found.explicit, found.vllm_argv) == ({"seed", "ring_mb", "learn"}, argv)
        assert front.parse([*argv, "--aurora-config", str(ours), "--aurora-learn"], {}).config.seed == 102
        assert front.parse([*argv, "--aurora-off"], {}).config == AuroraConfig()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("aurora-rng-mb: 3", "unknown key aurora_rng_mb in {file}; the nearest is aurora_ring_mb"),
        ("aurora-ring-mb: 0", "aurora_ring_mb in {file}: input should be greater than or equal to 1, not 0"),
    ],
)
def test_a_wrong_key_in_vllms_own_file_is_one_clear_line(text: str, line: str, tmp_path: Path) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text(text + "\n")
    with pytest.raises(SettingsError) as caught:
        front.parse(["--config", str(file)], {})
    assert str(caught.value).startswith(line.format(file=file))


@pytest.mark.parametrize("text", ["a: [", "- aurora-seed", "", "port: 3"])
def test_what_else_is_in_vllms_own_file_is_vllms(text: str, tmp_path: Path) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text(text + "\n")
    for argv in (["--config", str(file)], ["--config", "/nowhere.yaml"], ["--config"]):
        assert front.parse(argv, {}).config == AuroraConfig()


def test_the_release_trains_on_no_prompts() -> None:
    assert front.parse(["--aurora-semantics=aurora-release"], {}).config.semantics == "aurora-release"
    assert front.parse(["--aurora-semantics=aurora-release", "--aurora-prompt-weight=0"], {}).config.prompt_weight == 0
    with pytest.raises(SettingsError) as caught:
        front.parse(["--aurora-semantics=aurora-release"], {"AURORA_PROMPT_WEIGHT": "0.3"})
    assert str(caught.value).startswith("AURORA_PROMPT_WEIGHT: Aurora's release trains on no prompts")


def test_each_fault_has_its_line() -> None:
    with pytest.raises(SettingsError) as caught:
        front.parse(["--aurora-seed=x", "--aurora-ring-mb=0"], {})
    assert len(caught.value.lines) == 2


def test_an_empty_yaml_file_says_nothing(tmp_path: Path) -> None:
    file = tmp_path / "aurora.yaml"
    file.write_text("# nothing\n")
    assert front.parse([], {"AURORA_CONFIG": str(file)}).config == AuroraConfig()


def test_off_reads_no_settings() -> None:
    found = front.parse(["M", "--aurora-off"], {"AURORA_RNG_MB": "3", "AURORA_CONFIG": "/nowhere"})
    assert found.off
    assert found.vllm_argv == ["M"]
    assert front.parse(["M"], {"AURORA_OFF": "1", "AURORA_SESSION": "{}"}).off


def test_what_a_server_hands_to_its_processes_is_no_setting(capfd: Any) -> None:
    front.parse(["M"], {"AURORA_SESSION": "{}", "AURORA_SERVED_PLAIN": "it does not fit"})
    assert capfd.readouterr().err == ""


def test_plan_does_not_swallow_the_model() -> None:
    found = front.parse(["--aurora-plan", "M"], {})
    assert (found.plan, found.vllm_argv) == ("text", ["M"])
    assert front.parse(["--aurora-plan=json"], {}).plan == "json"
    assert front.parse([], {}).plan == ""


def test_help_names_every_key() -> None:
    text = front.parser().format_help()
    for name in AuroraConfig.model_fields:
        assert f"--aurora-{name.replace('_', '-')}" in text


def test_home_is_expanded_and_the_model_is_frozen() -> None:
    config = AuroraConfig(draft="~/draft", resume="~/kept", checkpoint_dir="~")
    assert config.draft == Path.home() / "draft"
    assert (config.resume, config.checkpoint_dir) == (Path.home() / "kept", Path.home())
    assert config.cache_dir.is_absolute()
    with pytest.raises(ValidationError):
        config.seed = 3  # type: ignore[misc]


def test_variables_of_others_are_ignored(capfd: Any) -> None:
    """Kubernetes' for a service called aurora, and somebody's Aurora of AWS."""
    others = {"AURORA_HOST": "db", "AURORA_TEAM": "x"}
    assert front.parse(["M"], others).config == AuroraConfig()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == len(others) and all("is like no setting of Aurora's and ignored" in line for line in lines)


@pytest.mark.parametrize("service", ["AURORA", "AURORA_VLLM", "AURORA_LEARNER", "AURORA_CACHE", "AURORA_RING_MB"])
def test_what_kubernetes_makes_of_a_service_is_nobody_s_setting(service: str, capfd: Any) -> None:
    words = ["SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_80_TCP", "PORT_80_TCP_PROTO"]
    words += ["PORT_80_TCP_PORT", "PORT_80_TCP_ADDR", "PORT_53_UDP"]
    made = {f"{service}_{word}": "10.0.0.1" for word in words}
    assert front.parse(["M"], made).config == AuroraConfig()
    assert capfd.readouterr().err == ""


def test_no_setting_is_called_like_what_kubernetes_makes() -> None:
    names = [f"AURORA_{name.upper()}" for name in AuroraConfig.model_fields]
    assert not [name for name in names if front.OF_A_SERVICE.fullmatch(name)]


def test_an_empty_variable_is_none() -> None:
    assert front.parse(["M"], {"AURORA_CACHE_DIR": "", "AURORA_RING_MB": ""}).config == AuroraConfig()
    with pytest.raises(AuroraError, match="--aurora-cache-dir: value error, the path is empty, not ''"):
        front.parse(["M", "--aurora-cache-dir="], {})


def test_nobodys_home_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nowhere)
    with pytest.raises(AuroraError, match="--aurora-cache-dir, not given: value error, there is no home directory"):
        front.parse(["M"], {})


@pytest.mark.parametrize(("flag", "value"), [("--aurora-learning-rate", "inf"), ("--aurora-seed", str(10**30))])
def test_numbers_no_machine_can_work_with(flag: str, value: str) -> None:
    with pytest.raises(AuroraError, match=flag):
        front.parse(["M", flag, value], {})
