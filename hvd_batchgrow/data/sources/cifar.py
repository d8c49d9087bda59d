"""CIFAR-10 and CIFAR-100."""

from __future__ import annotations

from hvd_batchgrow.config.source_specs import SOURCES, SourceSpec, load_of

_DOC = "the binary version, unpacked or as `.tar.gz`"
for _name, _doc in (("cifar10", _DOC), ("cifar100", f"{_DOC}; the labels are the 100 fine ones")):
    SOURCES.register(
        SourceSpec(
            name=_name,
            doc=_doc,
            kinds=("images",),
            keys=frozenset({"root"}),
            load=load_of("hvd_batchgrow.data.arrays.cifar"),
            num_samples=lambda data: 50_000,
        )
    )
