"""`axolotl asft check`, for people."""

import re
from collections import Counter

from axolotl_asft.cost import Cost
from axolotl_asft.dry_run import Check
from axolotl_asft.summary import model_text, size_text

LISTED = 5  # names of a kind, before the rest is counted


def check_text(check: Check) -> str:
    """Everything that was found, the verdict last."""
    parts = [_table(check), _unconstrained(check), _bullets("settings", check.settings)]
    parts += [_bullets("warnings", check.warnings), _bullets("errors: the run would stop here", check.errors)]
    verdict = "The run would start." if check.fine else "The run would not start."
    if check.fine and check.warnings:
        verdict += f" {len(check.warnings)} warnings." if len(check.warnings) > 1 else " 1 warning."
    return "\n\n".join([part for part in parts if part] + [verdict])


def _table(check: Check) -> str:
    lines = [("config", check.config)]
    if check.model:
        revision = f"@{check.model['revision'][:12]}" if check.model["revision"] else ""
        ranks = ", ".join(map(str, check.model["lora_r"]))
        lines.append(("model", f"{check.model['base_model']}{revision}, {check.model['architecture']}"))
        lines.append(("LoRA", f"{check.model['lora_layers']} layers, rank {ranks}"))
    lines += _direction_lines(check)
    if check.constrained:
        of = f"{len(check.constrained)} of {check.model['lora_layers']} LoRA layers"
        lines.append(("constrained", f"{of}: {kinds(check.constrained)}"))
        if check.unused:
            lines.append(("unused", f"{check.unused} layers of the direction file, which LoRA leaves alone"))
    lines += _cost_lines(check)
    return "\n".join(f"{label:<12}  {text}" for label, text in lines)


def _direction_lines(check: Check) -> list[tuple[str, str]]:
    found = check.direction
    if not found:
        return []
    pinned = "pinned" if found["pinned"] else "not pinned (direction_sha256)"
    weights = {
        "agree": "agree with the base model's files",
        "differ": "differ from the direction's, or cannot be compared with it: see the errors below",
        "not here": "not on this machine: the run compares them when it loads the model",
        "not asked": "not compared, here or in the run: verify_model is false",
    }
    return [
        ("direction", f"{found['direction']}, {size_text(found['bytes'])}, {found['modules']} layers"),
        ("sha256", f"{found['sha256']}, {pinned}"),
        ("base", model_text(found["base"])),
        ("aligned", model_text(found["aligned"])),
        ("metrics", ", ".join(found["metrics"])),
        ("made by", f"{found['tool']}, {found['created']}"),
        ("weights", weights[found["weights"]]),
    ]


def _cost_lines(check: Check) -> list[tuple[str, str]]:
    cost = check.cost
    if cost is None:
        return []
    held = ", ".join(f"{name} {size_text(size)}" for name, size in cost.memory.items() if size)
    return [
        ("memory", f"{size_text(sum(cost.memory.values()))} on the device ({held}),"),
        ("", f"plus about {size_text(cost.temporary)} of temporary memory"),
        ("step", f"about {cost.share:.2%} of its operations ({_flops(cost)}), estimated from sizes;"),
        ("", "its share of wall-clock time is larger: fp32, and on a fast GPU launches outlast arithmetic"),
    ]


def _flops(cost: Cost) -> str:
    anchor = f" of the penalty, {cost.anchor_flops:.2g} of the anchor" if cost.anchor_flops else ""
    return f"{cost.penalty_flops:.2g}{anchor}"


def _unconstrained(check: Check) -> str:
    lines = []
    for why in dict.fromkeys(check.unconstrained.values()):
        names = [name for name, reason in check.unconstrained.items() if reason == why]
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        lines.append(f"{why}: {', '.join(names[:LISTED])}{more}")
    return _bullets("not constrained", lines)


def kinds(names: list[str]) -> str:
    """Layers by the last part of their names, with how many there are of each."""
    counts = Counter(re.sub(r".*\.", "", name) for name in names)
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def _bullets(title: str, lines: list[str]) -> str:
    return "\n".join([title, *(f"  - {line}" for line in lines)]) if lines else ""
