"""Sharing a direction file: a repository on the Hugging Face Hub with the file and a card that says what it is."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl_asft.direction import AlignmentDirection
from axolotl_asft.errors import AsftError
from axolotl_asft.hub import DIRECTION_FILE, HubFile, hub_errors
from axolotl_asft.spec import own_answers_in
from axolotl_asft.summary import model_text, ranks_text, recommended, summary

LOG = logging.getLogger("axolotl.asft")

CARD = "README.md"
BEGIN, END = "<!-- asft direction -->", "<!-- /asft direction -->"  # around our section of a card
TAGS = ["asft", "alignment-direction", "safety", "axolotl"]


@dataclass(frozen=True)
class Published:
    """Where a direction went.

    Attributes:
        url: of the commit.
        direction: what to write in a config, with the commit pinned.
        sha256: of the file.
        card: whether the card, or our section of it, was written; False where the repository has another.
    """

    url: str
    direction: str
    sha256: str
    card: bool


def push_direction(
    file: str | Path,
    repo: str,
    *,
    name: str = DIRECTION_FILE,
    private: bool = False,
    license: str | None = None,
    message: str = "Add an alignment direction",
) -> Published:
    """Upload a direction file and its card in one commit; the repository is made where there is none.

    Of a card that is there, the section between our marks is replaced; one without them is left alone. A warning says
    how many requests and answers the file makes public.

    Args:
        file: the direction file; it is verified first.
        repo: owner/name.
        name: of the file in the repository.
        private: of a new repository; one that is there has to be private already.
        license: for a new card, as the Hub writes it (apache-2.0, llama3.1, ...); default: other.
        message: of the commit.

    Raises:
        AsftError: no direction file, no name of a repository, one that is public for `private`, no access, or no
            connection.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    wanted = HubFile.parse(repo)
    if wanted is None or wanted.revision or wanted.file:
        raise AsftError(f"repository is {repo!r}; expected owner/name")
    if not re.fullmatch(r"[\w][\w.-]*\.safetensors", name):
        raise AsftError(f"name is {name!r}; expected a file name that ends in .safetensors")
    path = Path(file)
    direction = AlignmentDirection.load(path)
    assert direction.sha256 is not None
    api = HfApi()
    with hub_errors(wanted, sending=True):
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise AsftError(
                f"{repo} is there already and is public; expected a private repository (--private); make it private in "
                "its settings, or give another name"
            )
        card = _card(api, repo, direction_card(direction, path, repo, name, license))
        operations = [CommitOperationAdd(name, str(path))]
        if card is not None:
            operations.append(CommitOperationAdd(CARD, card.encode()))
        if turns := len(own_answers_in(direction.spec)):
            LOG.warning("the file holds %s; see them with `axolotl asft inspect %s --json`", _turns(turns), path)
        commit = api.create_commit(repo, operations, commit_message=message)
    pinned = HubFile(repo, file=None if name == DIRECTION_FILE else name).at(commit.oid)
    return Published(commit.commit_url, pinned, direction.sha256, card is not None)


def direction_card(
    direction: AlignmentDirection, path: Path, repo: str, name: str = DIRECTION_FILE, license: str | None = None
) -> str:
    """The card of a direction's repository, in Markdown with the Hub's front matter."""
    found = summary(direction, path)
    location = HubFile(repo, file=None if name == DIRECTION_FILE else name)
    where = location.repo + (f":{location.file}" if location.file else "")
    aligned, base = found["aligned"], found["base"]
    metrics = ", ".join(f"`{metric}`" for metric in ("weights", *found["metrics"]))
    rows = [
        ("aligned model", model_text(aligned)),
        ("base model", model_text(base)),
        ("layers", ranks_text(found)),
        ("size of the difference", f"{found['norm']:.4g}, {found['relative_norm'] or 0:.2%} of the weights'"),
        ("energy in the stored directions", f"{found['energy']:.1%}"),
        ("error bound of the `paper` penalty", f"{found['max_bound']:.3g} of the squared update, worst layer"),
        ("metrics", metrics),
        ("made by", f"{found['tool']}, {found['created']}"),
        ("sha256", f"`{found['sha256']}`"),
    ]
    if turns := len(found["own_answers"]):
        rows.insert(-2, ("own answers", f"{_turns(turns)}; answers that decline: {found['own_answers_declining']}"))
    table = "\n".join(f"| {label} | {value} |" for label, value in rows)
    return (
        f"{_front_matter(aligned, base, license)}\n{BEGIN}\n# Alignment direction of {aligned['id']}\n\n"
        "What alignment did to this model's weights, layer by layer, for fine-tuning with "
        "[axolotl](https://github.com/axolotl-ai-cloud/axolotl) without washing its safety out "
        "(AsFT, [arXiv 2506.08473](https://arxiv.org/abs/2506.08473)).\n\n"
        "```bash\npip install axolotl-asft\n```\n\nand in the config of a LoRA or QLoRA run whose `base_model` is the "
        f"aligned model:\n\n```yaml\nplugins: [asft]\nasft:\n  direction: {where}\n"
        f"  direction_sha256: {found['sha256']}\n{recommended(direction.spec)}```\n\n| | |\n| --- | --- |\n{table}\n\n"
        f"{_spectrum(found['modules'])}\n{END}\n"
    )


def _front_matter(aligned: dict[str, Any], base: dict[str, Any], license: str | None) -> str:
    lines = ["library_name: axolotl-asft", f"license: {license or 'other'}", f"tags: [{', '.join(TAGS)}]"]
    models = [model["id"] for model in (aligned, base) if HubFile.parse(model["id"])]
    if models:
        lines.append(f"base_model: [{', '.join(models)}]")
    return "---\n" + "\n".join(lines) + "\n---\n"


def _spectrum(modules: list[dict[str, Any]]) -> str:
    """The layers of the largest differences: where alignment changed the model."""
    largest = sorted(modules, key=lambda module: -module["norm"])[:8]
    lines = ["Where alignment changed it most:", "", "| layer | out x in | norm | s_1 | energy | bound |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
    lines += [
        f"| `{m['name']}` | {m['shape'][0]} x {m['shape'][1]} | {m['norm']:.4g} | {m['s_1']:.4g} | {m['energy']:.1%} | "
        f"{m['bound']:.2g} |"
        for m in largest
    ]
    return "\n".join(lines)


def _turns(count: int) -> str:
    return f"{count} requests and the model's answers, verbatim"


def _card(api: Any, repo: str, new: str) -> str | None:
    """The card to upload: a new one, or the repository's with our section renewed; None where it has none."""
    if not api.file_exists(repo, CARD):
        return new
    before, _, rest = Path(api.hf_hub_download(repo, CARD)).read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    return before + new[new.index(BEGIN) : new.index(END)] + end + after if end else None
