"""What the constraint costs a run: memory on the device, and arithmetic beside that of the task. Estimates."""

from collections.abc import Sequence
from dataclasses import dataclass

from axolotl_asft.anchor import TEXTS
from axolotl_asft.layer_groups import TEMPORARY_BYTES_ON_GPU, LayerGroup

# Floating-point operations a parameter and token: forward 2, and backward 2, since frozen weights get no gradient.
FORWARD, BACKWARD = 2, 2
LETTERS_A_TOKEN = 4  # roughly, of English
FP32 = 4  # bytes; the penalty is computed in fp32


@dataclass(frozen=True)
class Cost:
    """Of the constraint on one device.

    Attributes:
        memory: what stays there, in bytes: "U", "c", "X", "Y", and "initial" (A0 and B0 of PiSSA and its like).
        temporary: bytes while a few layers are worked on, about: on a GPU, which takes more of them than a CPU.
        penalty_flops: floating-point operations of the penalty, an optimizer step.
        anchor_flops: of the model's passes over the anchor's answers, an optimizer step, about.
        task_flops: of the model's forward and backward passes, an optimizer step, about.
    """

    memory: dict[str, int]
    temporary: int
    penalty_flops: float
    anchor_flops: float
    task_flops: float

    @property
    def share(self) -> float:
        """Of the constraint in a step's floating-point operations."""
        ours = self.penalty_flops + self.anchor_flops
        return ours / (ours + self.task_flops)


def estimate(
    groups: Sequence[LayerGroup],
    parameters: int,
    tokens: int,
    checkpointing: bool,
    gradient: bool = True,
    budget: bool = False,
    log_every: int = 1,
    taken_out: bool = False,
    anchor_tokens: int = 0,
) -> Cost:
    """The cost of a run under the constraint.

    Args:
        groups: the constrained layers (`AlignmentPenalty.groups`).
        parameters: of the model.
        tokens: an optimizer step and device.
        checkpointing: whether the forward pass is computed twice.
        gradient: whether the penalty's gradient is added, which lambda_reg 0 leaves out.
        budget: whether the update is brought back to a budget after each step.
        log_every: steps from one log line, for which every layer is measured, to the next.
        taken_out: whether the update is B A - B0 A0, of twice the rank.
        anchor_tokens: of the answers that are asked for, an optimizer step; see `tokens_asked`.
    """
    sizes = [(_Sizes.of(group, 2 if taken_out else 1), len(group.found)) for group in groups]
    memory = {
        "U": sum(group.U.nbytes for group in groups),
        "c": sum(group.c.nbytes for group in groups),
        "X": sum(0 if group.X is None else group.X.nbytes for group in groups),
        "Y": sum(0 if group.Y is None else group.Y.nbytes for group in groups),
        "initial": sum(count * size.r // 2 * (size.rows + size.columns) * FP32 for size, count in sizes)
        if taken_out
        else 0,
    }
    flops = sum(
        count * (gradient * size.gradient_flops() + budget * size.shorten_flops() + size.measure_flops() / log_every)
        for size, count in sizes
    )
    passes = FORWARD * (2 if checkpointing else 1) + BACKWARD
    anchor, task = (float(passes * parameters * count) for count in (anchor_tokens, tokens))
    return Cost(memory, _at_a_time(groups, [size for size, _ in sizes]), flops, anchor, task)


def _at_a_time(groups: Sequence[LayerGroup], sizes: Sequence["_Sizes"]) -> int:
    """Bytes of the layers that a GPU takes together: those of one shape, and of one layer at least."""
    alike: dict[_Sizes, int] = {}
    for group, size in zip(groups, sizes, strict=True):
        alike[size] = alike.get(size, 0) + group.bytes_at_work
    most = max(group.bytes_at_work // len(group.found) for group in groups)
    return max(most, *(min(total, TEMPORARY_BYTES_ON_GPU) for total in alike.values()))


def tokens_asked(answers: Sequence[Sequence[str]], formats: Sequence[str] = (), general: Sequence[str] = ()) -> int:
    """Tokens of the answers, with their requests, that an anchor asks for at a step; from their letters, about.

    Args:
        formats: in which it asks beside the chat template; counted around a request that has one already.
        general: in which it asks besides (`axolotl_asft.prompt_formats.asked_ways`).
    """
    letters = sum(len(request) + len(answer) for request, answer in answers) / max(1, len(answers))
    kinds = [sum(map(len, texts)) / len(texts) for texts in (formats, general) if texts]
    letters += sum(kinds) / (1 + len(kinds))
    return round(min(TEXTS, len(answers)) * letters / LETTERS_A_TOKEN)


@dataclass(frozen=True)
class _Sizes:
    """Of one layer: out x in, LoRA's rank, columns of U, of X and of Y; None where X or Y is the identity."""

    rows: int
    columns: int
    r: int
    k: int
    m: int | None
    n: int | None

    @classmethod
    def of(cls, group: LayerGroup, factor: int) -> "_Sizes":
        (r, columns), rows = group.found[0].A.shape, group.found[0].B.shape[0]
        m, n = (None if factors is None else factors.shape[2] for factors in (group.X, group.Y))
        return cls(rows, columns, factor * r, group.U.shape[2], m, n)

    @property
    def seen(self) -> tuple[int, int]:
        """The sides of Y^T dW X."""
        return self.rows if self.n is None else self.n, self.columns if self.m is None else self.m

    def _through_metric(self) -> int:
        """A X and Y^T Z, once."""
        return 2 * self.r * (self.columns * (self.m or 0) + self.rows * (self.n or 0))

    def value_flops(self) -> int:
        height, width = self.seen
        return 4 * self.rows * self.k * self.r + self._through_metric() + 2 * self.r**2 * (height + width)

    def gradient_flops(self) -> int:
        """Of `penalty.lora_penalty_gradient`: the value, and the same way back."""
        _, width = self.seen
        back = 4 * self.rows * self.k * self.r + self._through_metric() + 2 * self.r**2 * (width + self.rows)
        return self.value_flops() + back

    def shorten_flops(self) -> int:
        return self.value_flops() + 4 * self.rows * self.k * self.r

    def measure_flops(self) -> int:
        plain = 4 * self.rows * self.k * self.r + 4 * self.r**2 * (self.rows + self.columns)
        return plain + (self.value_flops() if self.m is not None else 0)
