"""What all request bodies share: strict types, and no field that is ignored."""

# No `from __future__ import annotations`: pydantic reads the types of these fields.

import difflib
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

# Known fields that are not supported, with the values that would change nothing; None never does.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": (),
    "early_stopping": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "length_penalty": (1, 1.0),
    "metadata": ({},),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "priority": (0,),
    "prompt_cache_key": (),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "return_tokens_as_token_ids": (False,),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "use_beam_search": (False,),
    "verbosity": (),
    "vllm_xargs": ({},),
    "web_search_options": (),
}

# Fields of a message that clients send back as they got them.
MESSAGE_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "reasoning": (),
    "reasoning_content": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
    "type": ("message", "text"),
}


def refuse(param: str, message: str) -> PydanticCustomError:
    """Make the error of a validator.

    Args:
        param: Field it is about, within what the validator checks; "" if that is the field.
        message: What is wrong; of a field itself without its name and full stop.
    """
    # Braces would be read as a format.
    return PydanticCustomError("refused", "{message}", {"message": message, "param": param})


class Strict(BaseModel):
    """No unknown field, no value taken for another."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, given: Any) -> Any:
        """Drop what would change nothing, and name what is not supported or not known."""
        if not isinstance(given, dict):
            return given
        kept = {}
        names = [field.alias or name for name, field in cls.model_fields.items()]
        for name, value in given.items():
            if name in names:
                kept[name] = value
            elif name not in cls.unsupported:
                near = difflib.get_close_matches(name[:64], names, n=3, cutoff=0.6)
                hint = f" Did you mean {' or '.join(near)}?" if near else ""
                raise refuse(name, f"unknown field `{name[:64]}`.{hint}")
            # Of the same type, for True == 1.
            elif value is not None and not any(
                value == none and type(value) is type(none) for none in cls.unsupported[name]
            ):
                raise refuse(name, f"the field `{name}` is not supported here; leave it out.")
        return kept
