"""The `asft:` block of an axolotl YAML."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from axolotl_asft.errors import AsftError, did_you_mean
from axolotl_asft.prompt_formats import checked_formats


class AsftArgs(BaseModel):
    """Every key of the `asft:` block; unknown keys are refused by name."""

    model_config = ConfigDict(extra="forbid")

    direction: str = Field(
        min_length=1,
        description="direction file of the aligned base_model: a path, or owner/name[@revision][:file] on the Hub",
    )
    direction_sha256: str | None = Field(
        default=None, pattern=r"^[0-9a-fA-F]{64}$", description="refuse a direction file whose sha256 is not this one"
    )
    lambda_reg: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="weight of the penalty; null: 0.1 for metric fisher with an anchor, 0 with max_drift, else 1",
    )
    projector: Literal["paper", "normalized", "subspace"] = Field(
        default="paper", description="how the projector C weights the stored directions by their singular values"
    )
    rank: int | None = Field(
        default=None,
        ge=0,
        description="use only this many leading stored directions; null: all for metric weights, none for the others",
    )
    metric: Literal["weights", "activations", "fisher"] | None = Field(
        default=None,
        description="what the penalty measures the change of: the weights, the layers' outputs on safety prompts, or "
        "the aligned model's own refusals; null: fisher where the direction file holds it, else weights",
    )
    max_drift: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="budget: after each step, each layer's off-direction update is at most this multiple of the size "
        "of its alignment update; 0: none",
    )
    anchor_weight: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="weight of KL(aligned || current), nats per token, on the aligned model's stored answers "
        "(refusals and harmless ones), a few of which are scored at each step; 0: none; null: 3 where the metric is "
        "fisher, the direction file holds such answers and max_drift is not given, else 0",
    )
    prompt_formats: list[str] | None = Field(
        default=None,
        description="texts with {prompt} in the request's place, in which the anchor asks beside the bare chat "
        "template; null: those of the data, of a type such as alpaca, under system prompts, "
        "or with an instruction that most requests share; []: none",
    )
    general_formats: bool | None = Field(
        default=None,
        description="the anchor also asks under a few general system prompts and in later turns of a conversation, "
        "to be answered as the first, as a model is asked once it serves; null: true where there is an anchor and the "
        "chat template is the direction's; false: not",
    )
    lora_scaling: bool = Field(
        default=True, description="dW = scaling B A; false: dW = B A, without PEFT's scaling, as in the authors' code"
    )
    modules: list[str] | None = Field(
        default=None, min_length=1, description="regular expressions of the layers to constrain; null: every LoRA layer"
    )
    on_uncovered: Literal["error", "warn", "ignore"] = Field(
        default="error", description="what to do if a trainable weight is not covered by the penalty"
    )
    verify_model: bool = Field(
        default=True, description="refuse a direction that was extracted for weights other than this model's"
    )

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, block: Any) -> Any:
        if isinstance(block, dict):
            for key in block:
                if key not in cls.model_fields:
                    known = f"known keys: {', '.join(cls.model_fields)}"
                    hint = did_you_mean(str(key), cls.model_fields, known, cutoff=0.5)
                    raise ValueError(f"asft.{key} is not a key of the asft block; {hint}")
        return block

    @field_validator("lambda_reg", "rank", "max_drift", "anchor_weight", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("expected a number (YAML reads yes, on and true as booleans)")
        return value

    @field_validator("prompt_formats")
    @classmethod
    def _with_a_place(cls, value: list[str] | None) -> list[str] | None:
        try:
            return None if value is None else checked_formats(value)
        except AsftError as error:
            raise ValueError(str(error)) from error

    @field_validator("max_drift")
    @classmethod
    def _no_budget(cls, value: float | None) -> float | None:
        return value or None  # the command line, which has no null, says 0


class AsftPluginArgs(BaseModel):
    """What the plugin adds to axolotl's config."""

    asft: AsftArgs | None = Field(default=None, description="the AsFT constraint (arXiv 2506.08473)")


def parse_block(block: Any) -> AsftArgs:
    """The validated block.

    Raises:
        AsftError: one line for the first mistake in it.
    """
    if not isinstance(block, dict):
        raise AsftError(f"asft: is {block!r}; expected a block of keys, at least direction: path/to/file.safetensors")
    try:
        return AsftArgs.model_validate(dict(block))
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error" and not first["loc"]:
            raise AsftError(str(first["ctx"]["error"])) from error
        key = ".".join(["asft", *(str(part) for part in first["loc"])])
        if first["type"] == "missing":
            raise AsftError(f"{key} is missing; give it in the asft block") from error
        message = first["msg"][0].lower() + first["msg"][1:]
        if first["type"] == "value_error":
            message = str(first["ctx"]["error"])
        if first["type"] == "string_pattern_mismatch":
            message = "expected the sha256 of the file, 64 hexadecimal digits (sha256sum, or axolotl asft inspect)"
        raise AsftError(f"{key} is {first['input']!r}; {message}") from error
