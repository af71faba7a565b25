"""The JSON schema of a config with an `asft:` block, for editors; axolotl's own schema knows no plugin's keys."""

from typing import Any

from axolotl_asft.args import AsftPluginArgs


def config_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a YAML with an `asft` property; axolotl's own keys are let through."""
    schema = AsftPluginArgs.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "axolotl config with the AsFT constraint"
    schema["description"] = "the asft: block of an axolotl YAML; axolotl's own keys are not described here"
    schema["properties"]["plugins"] = {
        "type": "array",
        "items": {"type": "string"},
        "description": "axolotl plugins; the asft: block needs asft among them",
    }
    schema["dependentRequired"] = {"asft": ["plugins"]}
    schema["additionalProperties"] = True
    return schema
