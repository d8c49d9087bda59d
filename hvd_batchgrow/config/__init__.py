"""What a job file may say: one frozen model per section, and per policy and optimiser."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue

from hvd_batchgrow.config.model_names import check_name
from hvd_batchgrow.config.schedules import ScheduleSection
from hvd_batchgrow.config.triggers import NoTrigger, TriggerSection
from hvd_batchgrow.config.types import (
    NAME_PATTERN,
    FloatList,
    Fraction,
    NumRanks,
    PositiveFloat,
    PositiveInt,
    Section,
    tuples,
)

SOURCES = (
    "fashion_mnist",
    "idx",
    "cifar10",
    "cifar100",
    "imagenet",
    "image_folder",
    "webdataset",
    "tfrecord",
    "numpy",
    "covtype",
    "csv",
    "parquet",
    "synthetic_images",
    "synthetic_rows",
)


def _check_source(value: str) -> str:
    if value in SOURCES or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
        return value
    near = get_close_matches(value, SOURCES, n=1)
    if not near and re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", value):
        near = [":".join(value.rsplit(".", 1))]
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"{hint}one of {', '.join(SOURCES)}, or your own module:function")


def _check_separator(value: str) -> str:
    if value == "\t" or (len(value) == 1 and " " <= value <= "~" and not value.isalnum() and value not in "\"'.+-"):
        return value
    raise ValueError('one character, such as ",", ";", "|", " " or "\\t"')


class DataSection(Section):
    """`[data]`: which samples, and how a training sample is drawn from its image."""

    source: Annotated[str, AfterValidator(_check_source)]
    """A kind of source, or `module:function` of your own that is given this section and returns a `DatasetPair`."""
    root: str | None = None
    """Folder of the files; None: where the source is known to live, for those that can be found or fetched."""
    train: str | None = None
    """Training files below root: a folder, a file or a pattern; None: by the habit of the source."""
    test: str | None = None
    """Test files below root, likewise; None: by the habit of the source, or `test_fraction`."""
    test_fraction: Fraction = 0.0
    """For rows of one file: share of them, drawn by the seed, that is kept for testing; of synthetic samples, how many
    more there are to test on."""
    label: str | int | None = None
    """What holds the label: column of csv and parquet (name or index; None: the last), feature of tfrecord, field of
    a webdataset's .json."""
    text_labels: bool | None = None
    """csv and parquet: true: each distinct text of the label column is a class, also numbers and texts such as NA;
    false: labels are whole numbers; None: what the column holds, and an error if it holds both."""
    ignore_columns: Annotated[tuple[str | int, ...], BeforeValidator(tuples)] = ()
    """csv and parquet: columns that are not used, by name or index, such as a row index."""
    categorical: Annotated[tuple[str | int, ...], BeforeValidator(tuples)] = ()
    """csv and parquet: columns that hold categories, by name or index; the training rows decide which there are."""
    categorical_encoding: Literal["one_hot", "codes"] = "one_hot"
    """A category as one feature of 0 or 1 for each, or as its number 0 … K - 1 in one feature; not standardised."""
    unknown_category: Literal["error", "ignore"] = "error"
    """A category that no training row has, in a test row: an error, or encoded as a missing one: zeros, or -1."""
    missing: Literal["error", "mean", "zero", "drop_row"] = "error"
    """csv and parquet: what a missing number becomes: the mean of the training rows, or 0; a missing category becomes
    zeros, or -1. drop_row skips rows in which a value or the label is missing."""
    missing_values: Annotated[tuple[str, ...], BeforeValidator(tuples)] | None = None
    """csv: texts that mean a missing value, beside an empty cell; None: those of pandas, in columns of numbers only."""
    header: bool | None = None
    """csv: whether the first line holds the names of the columns; None: as it looks, and an error if unclear."""
    separator: Annotated[str, AfterValidator(_check_separator)] | None = None
    """csv: the character between columns; None: comma, semicolon, tab, bar or space, as the first lines show."""
    decimal: Literal[".", ","] = "."
    """csv: the decimal mark."""
    num_samples: PositiveInt | None = None
    """Training-set size, so that `plan` needs no data; None: known of the source."""
    num_classes: PositiveInt | None = None
    """None: as many as the training labels show; for synthetic sources 10."""
    shape: Annotated[tuple[PositiveInt, ...], BeforeValidator(tuples)] | None = None
    """Shape of a synthetic sample: [height, width, channels], or [features]. For numpy, idx and your own source: it
    confirms images that look as if their axes were in another order."""
    mean: Annotated[tuple[float, ...], BeforeValidator(tuples)] | None = None
    """Per channel of images scaled to [0, 1], or per feature; None: of the training set; encoded images: ImageNet's."""
    std: FloatList | None = None
    """Likewise."""
    pipeline: Literal["auto", "dali", "torch"] = "auto"
    """Who makes the pixels. All give the same ones; auto takes the faster one for the source."""
    on_bad_sample: Literal["error", "replace"] = "error"
    """A sample that cannot be read or decoded: end the run, or take the next of the stream in its place, and say so."""
    apply_orientation: bool = False
    """Encoded images: turn each as its EXIF orientation says. False: use the pixels as they are stored."""
    crop_padding: Annotated[int, Field(ge=0, le=64)] = 0
    """Zeros put around an image before a crop of its own size is drawn; 0: no crop."""
    hflip: bool = False
    """Mirror left to right with probability 1/2."""
    image_size: PositiveInt | None = None
    """Encoded images: side of what the network sees, a window drawn at random and resized; when testing, the centre."""
    crop_scale: Annotated[tuple[PositiveFloat, PositiveFloat], BeforeValidator(tuples)] = (0.08, 1.0)
    """Least and largest share of the image's area that the window has."""
    crop_ratio: Annotated[tuple[PositiveFloat, PositiveFloat], BeforeValidator(tuples)] = (3 / 4, 4 / 3)
    """Least and largest ratio of the window's width to its height."""
    eval_resize: PositiveInt | None = None
    """When testing, the shorter side of the image before its centre is cut out; None: image_size · 8/7."""
    channels_last: bool = False
    """Lay images out as NHWC in memory."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the normalised images as the network is given them."""


class ModelSection(Section):
    """`[model]`: the network and its ghost batch."""

    name: Annotated[str, AfterValidator(check_name)]
    """One of this package's, or `module:name` of your own, torchvision or timm."""
    kwargs: dict[str, JsonValue] = Field(default={})
    """For `module:name`: keyword arguments that it is called with, beside `num_classes`."""
    channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1), BeforeValidator(tuples)] | None = None
    """Widths of small_conv_net's convolutions, in order, or of dense7's hidden layers; None: the network's default."""
    ghost_batch: Annotated[int, Field(ge=2)]
    """Samples over which batch statistics are taken (γ); also the unit that the stream is cut into."""
    bn_momentum: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Weight of one ghost batch in the running statistics; of `module:name` too, whatever its norms had."""
    precise_bn_samples: PositiveInt | None = None
    """At each phase's end, make the running statistics plain averages under the weights of that moment, over so many
    of the samples seen last; None: they stay moving averages."""
    dropout: Fraction = 0.0
    """Share of the values that dense7 drops after each hidden layer, and a wrn between the convolutions of a block."""


class OptimBase(Section):
    """`[optim]`: the keys that all optimizers share."""

    name: str
    lr: PositiveFloat
    """Learning rate ε at the start of the schedule, after warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay; see decay_norm_and_bias for what it applies to."""
    decay_norm_and_bias: bool = False
    """true: weight decay also applies to normalisation parameters and biases (parameters of one dimension or none), as
    in torch's optimizers; false: only to weights of two or more dimensions."""

    @property
    def momentum_key(self) -> str:
        """The key that holds the momentum."""
        return "optim.momentum"

    def starting_at(self, lr: float, momentum: float) -> Self:
        """Return a copy whose schedule starts at this learning rate and momentum."""
        return self.model_copy(update={"lr": lr, "momentum": momentum})


class SgdSection(OptimBase):
    """`[optim]`, name = "sgd": stochastic gradient descent with momentum, in torch's form."""

    name: Literal["sgd"]
    momentum: Fraction = 0.9
    nesterov: bool = False
    rescale_momentum: bool = False
    """If the momentum changes from m to m', scale its buffer by (1-m)/(1-m'); otherwise let it refill."""


class AdamSection(OptimBase):
    """`[optim]`, name = "adam" or "adamw" (whose weight decay is decoupled)."""

    name: Literal["adam", "adamw"]
    betas: Annotated[tuple[Fraction, Fraction], BeforeValidator(tuples)] = (0.9, 0.999)
    """[β₁, β₂]: decay rates, per update, of the moving averages of the gradient and of its square."""
    eps: PositiveFloat = 1e-8

    @property
    def momentum(self) -> float:
        """β₁, which schedules treat as the momentum."""
        return self.betas[0]

    @property
    def momentum_key(self) -> str:
        """The key that holds the momentum."""
        return "optim.betas[0]"

    def starting_at(self, lr: float, momentum: float) -> Self:
        """Return a copy whose schedule starts at this learning rate and momentum."""
        return self.model_copy(update={"lr": lr, "betas": (momentum, self.betas[1])})


class LarsSection(OptimBase):
    """`[optim]`, name = "lars": SGD with momentum, the step of each tensor scaled by its trust ratio."""

    name: Literal["lars"]
    momentum: Fraction = 0.9
    trust_coefficient: PositiveFloat = 0.001
    """η: the change of a weight at a learning rate of 1, as a fraction of the weight's norm."""
    eps: Annotated[float, Field(ge=0)] = 0.0
    """Added to the denominator of the trust ratio."""
    rescale_momentum: bool = False
    """If the momentum changes from m to m', scale its buffer by (1-m)/(1-m'); otherwise let it refill."""


OptimSection = Annotated[SgdSection | AdamSection | LarsSection, Field(discriminator="name")]


KEYS_OF_GROW_BY: dict[str, tuple[str, ...]] = {
    "accumulation": (),
    "ranks": ("ranks_per_phase", "max_ranks"),
    "auto": ("max_ranks", "objective", "time_limit_h"),
}
"""Keys of `[layout]` that each growth uses, of those that not all do."""


class LayoutSection(Section):
    """`[layout]`: how a global batch is cut over ranks and passes. Decides the speed, never the result."""

    max_micro_batch: PositiveInt | None = None
    """Most samples of one forward and backward on one rank, a multiple of γ; None: the largest up to 128, or γ."""
    grow_by: Literal["accumulation", "ranks", "auto"] = "accumulation"
    """How a larger batch is formed: by more passes on all ranks; by more ranks, each with a full micro-batch as long
    as there are any; or, phase by phase, by what the objective wants (`plan --cost`)."""
    ranks_per_phase: Annotated[tuple[NumRanks, ...], BeforeValidator(tuples)] | None = None
    """For grow_by = "ranks": ranks of each phase; None: from the batch."""
    max_ranks: NumRanks | None = None
    """For grow_by = "ranks" and "auto", of those that are launched; None: all of them."""
    objective: Literal["least_time", "least_rank_hours"] = "least_time"
    """For grow_by = "auto"."""
    time_limit_h: PositiveFloat | None = None
    """For objective = "least_rank_hours": hours that the run may take."""
    uneven_ranks: bool = False
    """Allow ranks to hold unequal numbers of ghost batches."""
    exact: bool = False
    """Sum so that the weights are equal to the bit in every layout: one ghost batch a pass, summed without rounding."""
    compile: bool = False
    """Compile the network with torch.compile; the first update of each kind of pass takes minutes more."""
    threads_per_rank: PositiveInt | None = None
    """Torch threads of a rank; None: the cores of the host divided by its ranks, or 1 under `exact`."""

    def unused(self) -> list[str]:
        """Keys that say something which this growth has no use for."""
        others = dict.fromkeys(
            key for keys in KEYS_OF_GROW_BY.values() for key in keys if key not in KEYS_OF_GROW_BY[self.grow_by]
        )
        beside = ["max_ranks"] if self.grow_by == "ranks" and self.ranks_per_phase else []
        return [
            key for key in [*others, *beside] if getattr(self, key) not in (type(self).model_fields[key].default, ())
        ]

    def grown_by(self, grow_by: str, **changes: Any) -> LayoutSection:
        """The same by another growth, without what that has no use for; and with these changes."""
        grown = self.model_copy(update={"grow_by": grow_by, **changes})
        return grown.model_copy(update={key: type(self).model_fields[key].default for key in grown.unused()})


class UpdateSection(Section):
    """`[update]`: how the gradient of an update is computed, and what is done with it before it is used."""

    label_smoothing: Fraction = 0.0
    """Share of each target that is spread evenly over all classes."""
    clip_norm: PositiveFloat | None = None
    """Largest 2-norm of the averaged gradient of all parameters together; what is longer is scaled down."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the forward pass where torch's autocast knows it to be safe; float16 with a dynamic loss scale."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """If the loss or the gradient of an update is infinite or NaN: end the run, or skip the update and count it. If the
    test loss is: end the run, or disregard that evaluation, which is then neither an improvement nor part of a
    trigger's patience."""
    allreduce_dtype: Literal["none", "float16", "bfloat16"] = "none"
    """Type of the gradients while they cross the network: half the bytes, and a rounding that one rank does not have;
    bfloat16 not through Horovod."""
    ema_samples: PositiveFloat | None = None
    """Memory of a moving average of the weights, in samples, which is evaluated too; None: none is kept."""


class GradientNoiseSection(Section):
    """`[gradient_noise]`: B_simple = tr(Σ)/|G|², from the gradients of the passes of an update."""

    measure: bool = False
    """Measure and record it; a trigger that needs it does so in any case."""
    ema_epochs: PositiveFloat = 0.5
    """Over how many epochs tr(Σ) and |G|² are averaged, each on its own."""
    preconditioned: bool = False
    """For Adam: of the gradient as Adam scales it, element by element; else of the gradient itself."""
    per_layer_group: bool = False
    """Record it for each child of the network too."""


class EvaluationSection(Section):
    """`[evaluation]`: the whole test set, once, over all ranks."""

    every_epochs: PositiveFloat = 1.0
    batch_size: PositiveInt = 500
    """Samples of one forward pass."""


class CheckpointSection(Section):
    """`[checkpoint]`: also written at every phase boundary, at a stop and at the end."""

    every_epochs: PositiveFloat = 1.0
    keep: PositiveInt = 3


class LoggingSection(Section):
    """`[logging]`: what is recorded of a run."""

    logs_per_epoch: PositiveInt = 20
    """Training metrics are averaged over stretches of N / logs_per_epoch samples."""
    tensorboard: bool = True
    stall_timeout_s: PositiveFloat = 600.0
    """Without any progress for a tenth of this, the rank that stalls is named; for all of it, the job ends."""


class Job(Section):
    """A whole job file."""

    name: Annotated[
        str,
        Field(pattern=NAME_PATTERN, description="a name of at most 200 letters, digits, dots, dashes and underscores"),
    ]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: DataSection
    model: ModelSection
    optim: OptimSection
    schedule: ScheduleSection
    trigger: TriggerSection = NoTrigger(name="none")
    gradient_noise: GradientNoiseSection = GradientNoiseSection()
    update: UpdateSection = UpdateSection()
    layout: LayoutSection = LayoutSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()

    @property
    def micro_batch_limit(self) -> int:
        """Most samples of one forward and backward on one rank."""
        group = self.model.ghost_batch
        if self.layout.exact:
            return group
        return self.layout.max_micro_batch or max(1, 128 // group) * group

    @property
    def is_adaptive(self) -> bool:
        """Whether a trigger decides when the batch grows."""
        return self.schedule.policy == "adaptive"

    def deciding(self, num_samples: int) -> dict[str, Any]:
        """The keys that decide the weights a run ends with; all others may change at a resume.

        Args:
            num_samples: N, whether the job says it or it is known of the source.

        Returns:
            dotted key to plain value.
        """
        tree = self.model_dump(mode="json")
        measuring = ("trigger", "gradient_noise") if self.is_adaptive else ()
        flat = {
            f"{section}.{key}": value
            for section in ("data", "model", "optim", "schedule", "update", *measuring)
            for key, value in tree[section].items()
        }
        free = {"data.root", "data.num_samples", "data.pipeline", "data.channels_last"}
        free |= {"gradient_noise.measure", "gradient_noise.per_layer_group"}
        free |= {"data.shape"} if self.data.source in {"idx", "numpy"} else set()  # there it only confirms
        return {"seed": self.seed, "data.num_samples": num_samples} | {
            key: value for key, value in flat.items() if key not in free
        }

    def completed(self, deciding: Mapping[str, Any]) -> dict[str, Any]:
        """Add the defaults of those keys that did not exist when a run was recorded.

        Args:
            deciding: `Job.deciding()` of the run.
        """
        absent = [key.partition(".") for key in self.deciding(1) if key not in deciding]
        defaults = {
            section: type(getattr(self, section)).model_construct().model_dump(mode="json")
            for section, dot, _ in absent
            if dot
        }
        known = {f"{section}.{key}": defaults[section][key] for section, _, key in absent if key in defaults[section]}
        return known | dict(deciding)
