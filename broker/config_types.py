"""What sections of the settings tree are made of: the base of every table and the types of common values."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Seconds = Annotated[float, Field(gt=0, le=86_400 * 30)]
Bytes = Annotated[int, Field(ge=1)]
AgentName = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]


class Section(BaseModel):
    """Base of every table: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)
