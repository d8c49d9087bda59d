"""Fashion-MNIST: 60,000 images for training and 10,000 for testing."""

from __future__ import annotations

from hvd_batchgrow.config.source_specs import SOURCES, SourceSpec, load_of

SOURCES.register(
    SourceSpec(
        name="fashion_mnist",
        doc="an installed copy, otherwise downloaded from Debian's package or the authors' address; "
        "verified by SHA-256",
        kinds=("images",),
        keys=frozenset({"root"}),
        load=load_of("hvd_batchgrow.data.arrays.fashion_mnist"),
        num_samples=lambda data: 60_000,
    )
)
