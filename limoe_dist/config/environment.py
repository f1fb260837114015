"""The environment of a start, as far as it says how the run was computed, and without what may be secret.

What counts as secret is decided here alone, also for what `limoe submit` writes into a script. Rather too much is
hidden: who needs a value finds it in the job.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

KEPT = (
    "SLURM_",
    "SLURMD_",
    "OMPI_",
    "PMIX_",
    "PMI_",
    "NCCL_",
    "GLOO_",
    "UCX_",
    "FI_",
    "CUDA_",
    "NVIDIA_",
    "TORCH",
    "PYTORCH_",
    "OMP_",
    "MKL_",
    "OPENBLAS_",
    "DALI_",
    "DS_",
    "PYTHON",
    "CONDA_",
    "MASTER_",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
)
"""Beginnings of the names that are kept: only those that are known to matter, so that no stranger's secret slips in."""
KEPT_WHOLE = {
    "RANK",
    "WORLD_SIZE",
    "HOSTNAME",
    "VIRTUAL_ENV",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "TMPDIR",
    "LANG",
    "TZ",
} | {"LIMOE_LAUNCHER"}
STRANGE = ("SLURM_SPANK_",)
"""Beginnings of names within KEPT that are left out: plugins and users write there what they like."""
FREE_TEXT = re.compile("EXPORT|COMMENT|ENV_LIST|EXTRA", re.IGNORECASE)
"""In the name of what holds other variables or a person's own words: hidden as a whole, but for those of HARMLESS."""
HARMLESS = ("", "ALL", "NONE", "NIL")
HIDDEN = "(hidden)"
LONGEST = 4096

_WORDS = (
    # TOKENIZERS_PARALLELISM is none.
    "KEY|TOKEN(?!IZ)|SECRET|PASS|PWD|CRED|AUTH|JWT|COOKIE|SIGNATURE|PRIVATE|CERT|BEARER"
    # As whole words only: github_pat, and sig= of a signed URL.
    "|(?<![A-Z])(?:PAT|SIG)(?![A-Z])"
)
_SECRET_NAME = re.compile(_WORDS, re.IGNORECASE)
# Up to the last @ of what has no blank: passwords with / or @ in them are not always encoded.
_USER_IN_URL = re.compile(r"://[^\s@][^\s]*@")
# A port is no password.
_PASSWORD_IN_URL = re.compile(r"://[^/\s:@]*:(?!\d+/)[^\s@]+@")
# word=, "word": and word=>; --word and Bearer also with a blank alone. All behind it goes: where it ends nobody knows.
# /opt/keys:/usr/lib is a list of folders.
_BEHIND_WORD = re.compile(
    rf"(?:{_WORDS})[\w.-]{{0,64}}[\"']*\s*(?:=|:(?!/))\s*(?P<assigned>(?s:.+))"
    rf"|(?<![/\w.-])[\w.-]{{0,64}}(?:{_WORDS})[\w.-]{{0,64}}[\"']*\s*:(?P<rooted>/(?s:.+))"
    rf"|(?:(?<![\w-])--?[\w.-]{{0,64}}(?:{_WORDS})[\w.-]{{0,64}}|\bBearer|\bBasic)[\"']*\s+[\"']*(?P<given>(?s:.+))",
    re.IGNORECASE,
)
_KNOWN_FORM = re.compile(
    r"\b(?:gh[a-z]_|github_pat_|hf_|glpat-|xox[a-z]-|sk-|AKIA)[A-Za-z0-9_-]{16,}|\beyJ[\w-]+\.[\w.-]+"
)
"""Tokens of GitHub, Hugging Face, GitLab, Slack, OpenAI and AWS, and JSON web tokens."""


def captured(environ: Mapping[str, str]) -> dict[str, str]:
    """By name: launchers', schedulers', communication's and Python's variables; what may be secret is `(hidden)`.

    Bytes that are no UTF-8 become U+FFFD, so that the result can be written as JSON.
    """
    return {
        _text(name): _shown(name, _text(value))
        for name, value in sorted(environ.items())
        if name in KEPT_WHOLE or (name.startswith(KEPT) and not name.startswith(STRANGE))
    }


def is_secret(name: str) -> bool:
    """Whether a variable or option of this name may hold a secret."""
    return _SECRET_NAME.search(name) is not None


def without_secrets(text: str) -> str:
    """The text with `(hidden)` for what stands before the @ of a URL, behind token= and such, and for known tokens."""
    return _without_named(_USER_IN_URL.sub(f"://{HIDDEN}@", text))


def holds_secret(text: str) -> bool:
    """As `without_secrets` finds them; but in a URL only a user with a password is one."""
    return has_password(text) or _without_named(text) != text


def _without_named(text: str) -> str:
    text = _KNOWN_FORM.sub(HIDDEN, text)
    found = _BEHIND_WORD.search(text)
    return text[: found.start(str(found.lastgroup))] + HIDDEN if found else text


def has_password(text: str) -> bool:
    """Whether a URL in the text has a password; a user alone, as in sftp://me@host/, is none."""
    return _PASSWORD_IN_URL.search(text) is not None


def _shown(name: str, value: str) -> str:
    if is_secret(name) or (FREE_TEXT.search(name) and value not in HARMLESS):
        return HIDDEN
    return without_secrets(value)[:LONGEST]


def _text(given: str) -> str:
    """Python has bytes of the environment that are no UTF-8 as lone surrogates, which no file takes."""
    return given.encode(errors="surrogateescape").decode(errors="replace")
