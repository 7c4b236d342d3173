"""The section `serving.triton`: how a bundle is exported to Triton."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from engine.section import Section


class TritonConfig(Section):
    """How Triton runs an exported model; options of the command line go before it."""

    instances: int = Field(1, ge=1, le=64, description="processes a version; they share the tables' memory")
    batch_delay_us: int = Field(
        0, ge=0, le=1_000_000, description="how long a request may wait for others to be scored with, microseconds"
    )
    max_batch: int = Field(16, ge=1, le=1024, description="most requests that are scored together")
    threads: int = Field(1, ge=1, le=256, description="torch threads an instance")
    versions: int = Field(2, ge=1, le=16, description="newest versions that are kept and answer")
    item_vectors_mb: int = Field(
        256, ge=0, description="most memory for items' vectors, MiB; beyond it each request makes its own"
    )
    live: str = Field(
        "",
        description="folder of the memory that deltas are applied to, from the repository on; by default beside it, "
        "its name with `-live` behind; the environment's PLEXRANK_TRITON_LIVE goes before it",
    )
    variant: Literal["eager", "aoti"] = Field(
        "eager",
        description="how the part behind the tables runs: by torch's operations, or as machine code that the export "
        "compiles for processors like its own (AOTInductor; needs g++)",
    )
    tables: Literal["float32", "int8"] = Field(
        "float32", description="how the tables are held: int8 takes a byte a number and 8 bytes a row"
    )
    tolerance: float = Field(
        0.0,
        ge=0,
        le=1,
        description="largest difference to the in-process scorer's scores that an export accepts; 0: 1e-5, "
        "with int8 tables 0.01",
    )
