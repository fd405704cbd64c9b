"""The chain's last two steps: what AUTOBOT_LLM_* say, and the hardcoded values."""

from __future__ import annotations

import pytest

from slm.client.config import Step
from slm.client.resolution.environment import from_environment, hardcoded


def test_the_hardcoded_values_are_the_missions() -> None:
    """Ollama on this machine, mistral:7b-instruct, 30 s, 0.7."""
    config = hardcoded("any")
    assert config.step is Step.HARDCODED
    assert config.as_dict() == {
        "llm_provider": "ollama",
        "llm_endpoint": "http://localhost:11434",
        "llm_model": "mistral:7b-instruct",
        "llm_api_key": None,
        "llm_timeout": 30,
        "llm_temperature": 0.7,
        "llm_max_tokens": None,
        "llm_options": {},
    }
    assert config.revision is None
    assert not config.stale


def test_nothing_set_answers_nothing() -> None:
    """Without a single variable the step is passed over in silence; an empty one counts as none."""
    assert from_environment("a", {}).config is None
    answer = from_environment("a", {"AUTOBOT_LLM_PROVIDER": "", "AUTOBOT_LLM_MODEL": " "})
    assert (answer.config, answer.warnings) == (None, ())


def test_everything_set_is_used() -> None:
    """All seven variables make one config."""
    answer = from_environment(
        "a",
        {
            "AUTOBOT_LLM_PROVIDER": "openai",
            "AUTOBOT_LLM_ENDPOINT": "https://llm.example.com/v1",
            "AUTOBOT_LLM_MODEL": "gpt-6.1-sol",
            "AUTOBOT_LLM_API_KEY": "sk-env\n",
            "AUTOBOT_LLM_TIMEOUT": "60",
            "AUTOBOT_LLM_TEMPERATURE": "0.2",
            "AUTOBOT_LLM_MAX_TOKENS": "512",
        },
    )
    assert answer.warnings == ()
    config = answer.config
    assert config is not None
    assert config.step is Step.ENVIRONMENT
    assert config.agent_id == "a"
    assert config.as_dict() == {
        "llm_provider": "openai",
        "llm_endpoint": "https://llm.example.com/v1",
        "llm_model": "gpt-6.1-sol",
        "llm_api_key": "sk-env",
        "llm_timeout": 60,
        "llm_temperature": 0.2,
        "llm_max_tokens": 512,
        "llm_options": {},
    }


@pytest.mark.parametrize("form", ['"{}"', " '{}'\r\n", "\ufeff{}"])
def test_quotes_around_a_value_are_no_part_of_it(form: str) -> None:
    """What an env file or an editor leaves around a value is dropped, around a key as well."""
    values = {
        "PROVIDER": "openai",
        "MODEL": "m",
        "ENDPOINT": "https://h/v1",
        "API_KEY": "sk-env",
        "TIMEOUT": "5",
    }
    answer = from_environment("a", {f"AUTOBOT_LLM_{k}": form.format(v) for k, v in values.items()})
    assert (answer.config is not None, answer.warnings) == (True, ())
    assert answer.config is not None
    fields = answer.config.as_dict()
    assert {k: str(fields[f"llm_{k.lower()}"]) for k in values} == values


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("https://h/v1?api-version=1", "query"),
        ("https://h/v1/chat/completions", "/chat/completions"),
        ("ftp://h", "not an http or https URL"),
    ],
)
def test_the_warning_says_what_is_wrong_with_an_endpoint(value: str, why: str) -> None:
    """The rule that it breaks is named, and the value is not."""
    environ = {"AUTOBOT_LLM_MODEL": "m", "AUTOBOT_LLM_ENDPOINT": value}
    answer = from_environment("a", environ)
    assert answer.config is None
    assert "AUTOBOT_LLM_ENDPOINT" in answer.warnings[0]
    assert why in answer.warnings[0]
    assert value not in " ".join(answer.warnings)


@pytest.mark.parametrize(
    ("name", "value"), [("MODEL", "llama3"), ("ENDPOINT", "http://gpu:11434"), ("TIMEOUT", "5")]
)
def test_one_is_enough_and_ollama_fills_the_rest(name: str, value: str) -> None:
    """A single variable makes the step answer, with the hardcoded values beside it."""
    config = from_environment("a", {f"AUTOBOT_LLM_{name}": value}).config
    assert config is not None
    assert config.llm_provider == "ollama"
    fields = config.as_dict()
    assert str(fields.pop(f"llm_{name.lower()}")) == value
    expected = hardcoded("a").as_dict()
    expected.pop(f"llm_{name.lower()}")
    assert fields == expected


def test_another_provider_keeps_its_own_endpoint() -> None:
    """The hardcoded endpoint is ollama's alone; None stands for the provider's own."""
    config = from_environment(
        "a", {"AUTOBOT_LLM_PROVIDER": "anthropic", "AUTOBOT_LLM_MODEL": "claude"}
    ).config
    assert config is not None
    assert config.llm_endpoint is None


def test_another_provider_needs_a_model() -> None:
    """mistral:7b-instruct at OpenAI makes no sense: the step is passed over, and says so."""
    answer = from_environment("a", {"AUTOBOT_LLM_PROVIDER": "openai", "AUTOBOT_LLM_API_KEY": "sk"})
    assert answer.config is None
    assert any("AUTOBOT_LLM_MODEL" in warning for warning in answer.warnings)


def test_a_temperature_that_nobody_set_is_not_sent() -> None:
    """Only ollama's has a hardcoded one; `none` says that none is sent, there too."""
    another = {"AUTOBOT_LLM_PROVIDER": "openai", "AUTOBOT_LLM_MODEL": "m"}
    for environ in (
        another,
        {"AUTOBOT_LLM_MODEL": "m", "AUTOBOT_LLM_TEMPERATURE": "None"},
        {"AUTOBOT_LLM_TEMPERATURE": "none"},
    ):
        answer = from_environment("a", environ)
        assert answer.config is not None
        assert (answer.config.llm_temperature, answer.warnings) == (None, ())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PROVIDER", "watson"),
        ("ENDPOINT", "ftp://x"),
        ("ENDPOINT", "http://169.254.169.254/latest"),
        ("ENDPOINT", "https://user:canary@x.example"),
        ("MODEL", "two\nlines"),
        ("API_KEY", "canary with spaces"),
    ],
)
def test_what_decides_where_a_request_goes_must_parse(name: str, value: str) -> None:
    """A wrong provider, endpoint, model or key passes the step over: the rest was set for it."""
    answer = from_environment(
        "a",
        {
            "AUTOBOT_LLM_PROVIDER": "openai",
            "AUTOBOT_LLM_MODEL": "gpt-6.1-sol",
            "AUTOBOT_LLM_API_KEY": "sk-canary",
            f"AUTOBOT_LLM_{name}": value,
        },
    )
    assert answer.config is None
    assert any(f"AUTOBOT_LLM_{name}" in warning for warning in answer.warnings)
    assert "canary" not in " ".join(answer.warnings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TIMEOUT", "soon"),
        ("TIMEOUT", "0"),
        ("TIMEOUT", "9" * 5000),
        ("TEMPERATURE", "nan"),
        ("TEMPERATURE", "3"),
        ("MAX_TOKENS", "-1"),
        ("MAX_TOKENS", "1.5"),
    ],
)
def test_a_number_that_does_not_parse_is_passed_over_alone(name: str, value: str) -> None:
    """A wrong number costs only itself, with a warning."""
    answer = from_environment("a", {"AUTOBOT_LLM_MODEL": "llama3", f"AUTOBOT_LLM_{name}": value})
    assert answer.config is not None
    assert answer.config.llm_model == "llama3"
    expected = hardcoded("a").as_dict()[f"llm_{name.lower()}"]
    assert answer.config.as_dict()[f"llm_{name.lower()}"] == expected
    assert [f"AUTOBOT_LLM_{name}" in warning for warning in answer.warnings] == [True]


def test_a_number_alone_that_does_not_parse_answers_nothing() -> None:
    """Where nothing usable is set, the next step answers."""
    answer = from_environment("a", {"AUTOBOT_LLM_TIMEOUT": "soon"})
    assert answer.config is None
    assert answer.warnings


def test_a_key_without_a_provider_is_sent_to_nobody() -> None:
    """Somebody's key is not given to ollama because the provider's name was forgotten."""
    answer = from_environment(
        "a", {"AUTOBOT_LLM_API_KEY": "sk-canary", "AUTOBOT_LLM_MODEL": "gpt-6.1-sol"}
    )
    assert answer.config is not None
    assert answer.config.llm_api_key is None
    assert any("AUTOBOT_LLM_API_KEY" in warning for warning in answer.warnings)
