"""What the options of a command come to: a model's path, a prompt or a turn, a session."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..kernels.errors import InvalidInput
from ..kernels.files import check_target
from .chat import encode_chat
from .printing import bars
from .wording import notice

if TYPE_CHECKING:
    from .model import Model
    from .session import Session

_CHAT_OPTIONS = (
    "single_turn", "system_prompt", "chat_template", "chat_template_file", "chat_template_kwargs",
)  # fmt: skip


def open_session(path: str, options: dict[str, Any]) -> Session:
    """Load the model and start a session, or go on with a saved one."""
    if options["state_out"] is not None:
        read = [path, options["prompt_file"], options["chat_template_file"]]
        check_target(options["state_out"], read)
    from .model import Model
    from .session import Session
    from .snapshot import Snapshot

    with bars(wiped=False) as report:
        model = Model(
            path, options["threads"], options["backend"], notice, report,
            options["repack"], options["max_ram"], text=True, context=options["context"],
            cache_type_k=options["cache_type_k"], cache_type_v=options["cache_type_v"],
            state_type=options["state_type"],
        )  # fmt: skip
    names = (
        "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n",
        "presence_penalty", "frequency_penalty",
    )  # fmt: skip
    settings = {name: options[name] for name in names if options[name] is not None}
    if options["logit_bias"]:
        settings["logit_bias"] = dict(options["logit_bias"])
    seed = options["seed"]
    if options["state_in"]:
        if seed is not None and seed >= 0:
            settings["seed"] = seed
        return Session.resume(
            model, Snapshot.load(options["state_in"], model),
            options["stop"], options["ignore_eos"], **settings,
        )  # fmt: skip
    settings["seed"] = secrets.randbits(32) if seed is None or seed < 0 else seed
    return Session(model, stop=options["stop"], ignore_eos=options["ignore_eos"], **settings)


def model_and_text(
    model: str | None, text: str | None, options: dict[str, Any]
) -> tuple[str, str | None]:
    """Model and text from positions or options; raises InvalidInput for a missing model."""
    repo, named = options.get("hf_repo"), options["model_option"]
    for option in ("hf_file", "hf_token", "offline"):
        if repo is None and options.get(option):
            flag = option.replace("_", "-")
            raise click.UsageError(f"--{flag} is said of a repository, and --hf-repo names none")
    if repo is not None and text is None:
        model, text = None, model  # the only argument beside -hf is the prompt
    text = one_of(text, options["prompt_option"], "prompt")
    path = named_model(model, one_of(named, repo, "model"))
    if repo is None and path != "demo" and not Path(path).exists():
        raise InvalidInput(
            f"{path}: there is no such model file (the demo model: give the text with "
            "-p; one of the hub: keelback run -hf USER/MODEL)"
        )
    return path, text


def prompt_text(text: str | None, options: dict[str, Any], needed: bool = True) -> str:
    """The prompt, from wherever it comes; raises InvalidInput where one is needed and missing."""
    from .terminal import read_prompt

    if text is not None and options["prompt_file"] is not None:
        raise click.UsageError("the prompt is given twice, as text and as a file")
    return read_prompt(text, options["prompt_file"], needed)


def turn_encoder(model: Model, options: Mapping[str, Any]) -> Callable[[str], list[int]] | None:
    """What turns a prompt into the ids of a user's turn, or None where no option asks for that.

    options: those of `chat_options`; each of them asks for it. Raises InvalidInput for values that
    make no sense.
    """
    if not any(options[name] for name in _CHAT_OPTIONS):
        return None
    if options["state_in"]:
        raise InvalidInput("a saved state goes on with plain text; leave -st and its like out")
    template, file = options["chat_template"], options["chat_template_file"]
    origin = "--chat-template"
    if file is not None:
        from .template import LARGEST_TEMPLATE
        from .terminal import read_file

        if template is not None:
            raise click.UsageError("the chat template is given twice, as text and as a file")
        template, origin = read_file(file, 4 * LARGEST_TEMPLATE + 1), file
    if template is not None and "{" not in template:
        raise InvalidInput(
            f"{origin} holds no Jinja template, and names of llama.cpp's templates are not known; "
            "write one, or leave the option out"
        )
    variables = _variables(options["chat_template_kwargs"])
    system = options["system_prompt"]

    def encode(text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        return encode_chat(model, messages, template=template, origin=origin, variables=variables)

    return encode


def named_model(argument: str | None, option: str | None) -> str:
    """The model that was named, by an argument or an option; the embedded one where none was."""
    return one_of(argument, option, "model") or "demo"


def one_of(argument: str | None, option: str | None, name: str) -> str | None:
    """What was given as an argument or as an option, but not as both."""
    if argument is not None and option is not None:
        raise click.UsageError(f"the {name} is given twice; give it once")
    return argument if argument is not None else option


def _variables(text: str | None) -> dict[str, Any]:
    try:
        values = json.loads(text or "{}")
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise InvalidInput('--chat-template-kwargs is no JSON object; write one as {"name": true}')
    return values
