"""What whoever asks for training and whoever trains must agree on: where data and the queue are."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

__all__ = ["DATABASE_URL_HELP", "DATA_FOLDER", "DATA_FOLDER_HELP", "DatabaseUrl"]


DATA_FOLDER = "prefixtune-data"
"""The default folder of uploaded files and jobs."""
DATA_FOLDER_HELP = "folder of uploaded files and jobs; made when it is first needed"
DATABASE_URL_HELP = (
    "queue of jobs: postgresql://... where several machines serve and train, or sqlite:///FILE; "
    "empty: jobs.sqlite in the data folder"
)
_SCHEMES = ("sqlite:///", "postgresql://", "postgresql+psycopg://")


def _check_url(url: str) -> str:
    # No message repeats it: it may hold a password.
    if url and not url.startswith(_SCHEMES):
        raise ValueError("must begin with postgresql:// or sqlite:///")
    return url


DatabaseUrl = Annotated[str, AfterValidator(_check_url)]
"""Where the queue of jobs is; empty: in the data folder."""
