"""The sections and keys of a job file: one frozen model per section and optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, PrivateAttr

from hvd_batchgrow.config.layout import LayoutSection
from hvd_batchgrow.config.model_specs import check_name
from hvd_batchgrow.config.observer_names import check_observer
from hvd_batchgrow.config.optim import OptimSection
from hvd_batchgrow.config.schedules import ScheduleBase
from hvd_batchgrow.config.source_specs import SOURCES, check_source
from hvd_batchgrow.config.split import num_validation
from hvd_batchgrow.config.task import TaskSection
from hvd_batchgrow.config.triggers import TriggerBase
from hvd_batchgrow.config.types import (
    FloatList,
    Fraction,
    NamePattern,
    NonNegative,
    PositiveFloat,
    PositiveInt,
    Probability,
    RunName,
    Section,
    matching,
    tuples,
)


def _check_separator(value: str) -> str:
    if value == "\t" or (len(value) == 1 and " " <= value <= "~" and not value.isalnum() and value not in "\"'.+-"):
        return value
    raise ValueError('one character, such as ",", ";", "|", " " or "\\t"')


class DataSection(Section):
    """`[data]`: the training and test samples, and the augmentation."""

    source: Annotated[str, AfterValidator(check_source)]
    """A kind of source, or your own `module:function`, which gets this section and returns a `Datasets` or torch
    Datasets."""
    root: str | None = None
    """Folder of the files, relative to the working directory. None: the known folder of a source that can be found or
    downloaded."""
    train: str | None = None
    """Training files below `root`: a folder, a file or a pattern. None: the usual names of the source."""
    test: str | None = None
    """Test files below `root`, like `train`. None: the usual names of the source, or `test_fraction`."""
    test_fraction: Fraction = 0.0
    """A table in one file, one folder of images, or a single torch Dataset: fraction held out for testing, drawn by the
    seed. Synthetic sources: number of test samples, as a fraction of the training set."""
    validation_fraction: Fraction = 0.0
    """Fraction of the training samples, drawn by the seed, that is held out of training and evaluated during training
    instead of the test set. The test set is then evaluated once, at the end. 0: the test set is evaluated."""
    label: Annotated[str | int | tuple[str | int, ...], BeforeValidator(tuples)] | None = None
    """Where the target is: a column of csv and parquet (name or index; None: the last one), a feature of tfrecord, or a
    field of webdataset's .json. For multi_label and regression, csv and parquet: a list of columns."""
    text_labels: bool | None = None
    """csv and parquet. true: every distinct text of the label column is a class, even numbers and texts such as NA.
    false: labels are whole numbers. None: decided by the column; a column with both is an error."""
    ignore_columns: Annotated[tuple[str | int, ...], BeforeValidator(tuples)] = ()
    """csv and parquet: columns to ignore, by name or index, such as a row index."""
    categorical: Annotated[tuple[str | int, ...], BeforeValidator(tuples)] = ()
    """csv and parquet: columns that hold categories, by name or index. Only the training rows define categories."""
    categorical_encoding: Literal["one_hot", "codes"] = "one_hot"
    """one_hot: one feature of 0 or 1 per category. codes: one feature with the category's number, 0 … K - 1. Neither is
    standardized."""
    unknown_category: Literal["error", "ignore"] = "error"
    """If a test row has a category that no training row has: raise an error, or encode it like a missing category, as
    zeros or -1."""
    missing: Literal["error", "mean", "zero", "drop_row"] = "error"
    """csv and parquet: replacement of a missing number: the mean of the training rows, or 0. A missing category becomes
    zeros, or -1. drop_row skips rows in which a value or the label is missing."""
    missing_values: Annotated[tuple[str, ...], BeforeValidator(tuples)] | None = None
    """csv: texts that mean a missing value, besides an empty cell. None: pandas' list, in columns of numbers only."""
    header: bool | None = None
    """csv: whether the first line holds the column names. None: decided by the first lines; an error if unclear."""
    separator: Annotated[str, AfterValidator(_check_separator)] | None = None
    """csv: the character between columns. None: comma, semicolon, tab, bar or space, decided by the first lines."""
    decimal: Literal[".", ","] = "."
    """csv: the decimal mark."""
    num_samples: PositiveInt | None = None
    """Number of training samples, with those of `validation_fraction`. `plan` uses it before the data exists. None: the
    known size of the source; if it is unknown, the samples are counted."""
    num_classes: PositiveInt | None = None
    """Number of classes. None: the number of classes in the training labels, or the number that a torch Dataset
    states; 10 for synthetic sources. tokens: size of the vocabulary; required."""
    class_names: Annotated[tuple[str, ...], BeforeValidator(tuples)] | None = None
    """Names of the classes, labels or numbers, in order, if the source does not name them; `predict` prints them."""
    context: PositiveInt | None = None
    """tokens: tokens of one sample. Required."""
    token_dtype: Literal["uint8", "uint16", "uint32"] | None = None
    """tokens: type of the tokens in files other than .npy, little-endian. Required for them."""
    shape: Annotated[tuple[PositiveInt, ...], BeforeValidator(tuples)] | None = None
    """Shape of a synthetic sample: [height, width, channels], or [features]. For numpy, idx and your own source:
    confirms the order of the axes where it looks unusual."""
    mean: Annotated[tuple[float, ...], BeforeValidator(tuples)] | None = None
    """Mean per channel of images scaled to [0, 1], or per feature. None: of the training set; encoded images:
    ImageNet's."""
    std: FloatList | None = None
    """Standard deviation, per channel or feature like `mean`."""
    pipeline: Literal["auto", "dali", "torch"] = "auto"
    """Image pipeline. On a CPU both give the same pixels; auto chooses the faster one for the source."""
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    """Torch Datasets: processes per rank that read samples ahead of training. 0: the rank's process reads them itself.
    The number does not change the samples."""
    on_bad_sample: Literal["error", "replace"] = "error"
    """If a sample cannot be read or decoded: end the run, or report it and use the next sample of the stream."""
    apply_orientation: bool = False
    """Encoded images: rotate each image by its EXIF orientation. false: use the pixels as stored."""
    crop_padding: Annotated[int, Field(ge=0, le=64)] = 0
    """Images of one size: zero pixels added on each side before a random crop of the original size. 0: no crop."""
    hflip: bool = False
    """Flip training images left to right with probability 1/2."""
    image_size: PositiveInt | None = None
    """Encoded images: side of the network's input, in pixels. Training uses a random resized crop, tests the center."""
    crop_scale: Annotated[tuple[PositiveFloat, PositiveFloat], BeforeValidator(tuples)] = (0.08, 1.0)
    """[min, max] area of the random crop, as a fraction of the image."""
    crop_ratio: Annotated[tuple[PositiveFloat, PositiveFloat], BeforeValidator(tuples)] = (3 / 4, 4 / 3)
    """[min, max] ratio of width to height of the random crop."""
    eval_resize: PositiveInt | None = None
    """Encoded images in tests: shorter side after resizing, before the center crop. None: image_size · 8/7."""
    auto_augment: Literal["randaugment", "trivialaugment_wide"] | None = None
    """Training images: random operations such as shear, rotate or posterize, as in torchvision's RandAugment or
    TrivialAugmentWide. None: no such operations."""
    randaugment_num_ops: Annotated[int, Field(ge=1, le=14)] = 2
    """randaugment: number of operations per image."""
    randaugment_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """randaugment: strength of each operation, on a scale of 0 to 30."""
    color_jitter: (
        Annotated[tuple[NonNegative, NonNegative, NonNegative, NonNegative], BeforeValidator(tuples)] | None
    ) = None
    """Training images: [brightness, contrast, saturation, hue], the largest random change of each, as in torchvision's
    ColorJitter. None: no change."""
    random_erasing: Probability = 0.0
    """Probability that a random rectangle of a training image is set to 0 after normalization. 0: no erasing."""
    random_erasing_scale: Annotated[tuple[PositiveFloat, PositiveFloat], BeforeValidator(tuples)] = (0.02, 0.33)
    """[min, max] area of the erased rectangle, as a fraction of the image."""
    random_erasing_ratio: Annotated[tuple[PositiveFloat, PositiveFloat], BeforeValidator(tuples)] = (0.3, 3.3)
    """[min, max] ratio of height to width of the erased rectangle."""
    mixup_alpha: NonNegative = 0.0
    """Mixup: blend each training image, and its target, with another one of its ghost batch. The share of the
    image is drawn from Beta(mixup_alpha, mixup_alpha). 0: no Mixup."""
    cutmix_alpha: NonNegative = 0.0
    """CutMix: replace a box of each training image by that of another one of its ghost batch, and mix the targets by
    area. The box's area is drawn from Beta(cutmix_alpha, cutmix_alpha). 0: no CutMix."""
    mixup_prob: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability that a ghost batch is mixed, by Mixup or CutMix."""
    mixup_switch_prob: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """If both Mixup and CutMix are on: probability that a mixed ghost batch is mixed by CutMix."""
    channels_last: bool = False
    """Store images as NHWC in memory, and the network's weights in the same order."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the normalized images; the network gets them in the type of its weights. float16 halves their memory."""

    _first_label: int | None = PrivateAttr(default=None)

    @property
    def first_label(self) -> int | None:
        """Label of class 0, 0 or 1, in the data of a trained run. None: the training labels decide."""
        return self._first_label

    def counted_from(self, first_label: int | None) -> Self:
        """Return a copy with a `first_label`, which a job cannot state."""
        copy = self.model_copy()
        copy._first_label = first_label
        return copy

    @property
    def mixes_samples(self) -> bool:
        """Whether the inputs of a sample depend on other samples of its ghost batch."""
        return bool(self.mixup_alpha or self.cutmix_alpha)


class ModelSection(Section):
    """`[model]`: the network and its ghost batch."""

    name: Annotated[str, AfterValidator(check_name)]
    """A network of this package, or `module:name` for your own, torchvision's or timm's."""
    kwargs: dict[str, JsonValue] = Field(default={})
    """For `module:name`: keyword arguments of the call. `num_classes` replaces the data's number of classes."""
    channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1), BeforeValidator(tuples)] | None = None
    """Widths of small_conv_net's convolutions or dense7's six hidden layers, in order. None: the network's default."""
    ghost_batch: PositiveInt
    """γ: samples over which batch norm computes its statistics. The stream is cut into ghost batches of this size. 1
    requires a network without batch norm."""
    bn_momentum: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Weight of one ghost batch in the running statistics. For `module:name` it replaces the value of the norms."""
    precise_bn_samples: PositiveInt | None = None
    """At the end of each phase, recompute the running statistics with the current weights, as plain averages over this
    many of the most recent samples. None: keep the moving averages."""
    dropout: Fraction = 0.0
    """Dropout probability: in dense7 after each hidden layer, in a wrn between the convolutions of a block."""
    shakedrop: Fraction = 0.0
    """Probability that ShakeDrop perturbs a sample in the last of the L residual blocks of a wrn or a CIFAR ResNet; in
    block l it is l/L times as large. 0: no ShakeDrop."""
    classifier: Literal["linear", "hadamard"] = "linear"
    """Last layer of a network of this package. hadamard: its weight is a fixed Hadamard matrix, its input is normalized
    to length 1, and only one scale and the biases are trained and all-reduced."""
    pretrained: Annotated[str, Field(min_length=1)] | None = None
    """File of initial weights: a state_dict that torch saved, or .safetensors. None: random weights from the seed."""
    allow_new_head: bool = False
    """If the classifier in `pretrained` has another number of classes, or is missing: keep the network's initial
    weights for it (true), or raise an error (false)."""
    freeze: Annotated[tuple[NamePattern, ...], BeforeValidator(tuples)] = ()
    """Patterns of names of parameters that are not trained. Norms of which all parameters are frozen keep their running
    statistics."""


class UpdateSection(Section):
    """`[update]`: how the gradient of an update is computed and processed."""

    clip_norm: PositiveFloat | None = None
    """Largest 2-norm of the averaged gradient of all parameters together; a longer gradient is scaled down. None: no
    clipping."""
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the forward and backward passes. float32: products are not rounded to fewer bits, also on GPUs.
    tf32: on a GPU, products of float32 numbers with 10-bit mantissas. bfloat16 and float16: torch's autocast; float16
    uses a dynamic loss scale."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """If the loss or the gradient of an update is infinite or NaN: end the run, or skip the update and count it. If the
    loss of an evaluation is infinite or NaN: end the run, or ignore the evaluation, which then counts neither as an
    improvement nor for a trigger's patience."""
    allreduce_dtype: Literal["none", "float16", "bfloat16"] = "none"
    """Type of the gradients in the all-reduce. The 16-bit types halve the bytes and round, which a run on one rank does
    not. Horovod does not support bfloat16."""
    ema_samples: PositiveFloat | None = None
    """Time constant, in samples, of a moving average of the weights, which is evaluated too. None: no average."""


class GradientNoiseSection(Section):
    """`[gradient_noise]`: measure B_simple = tr(Σ)/|G|² from the gradients of an update's parts."""

    measure: bool = False
    """Measure and record B_simple. A trigger that needs it measures it in any case."""
    estimator: Literal["micro_batches", "norm_layers"] = "micro_batches"
    """micro_batches: from the gradients of an update's micro-batches, at least two over all ranks. norm_layers: from
    the gradients of normalization layers for each ghost batch or, in networks without batch norm, each sample."""
    norm_layers_factor: PositiveFloat = 1.0
    """norm_layers: B_simple of the network as a multiple of that of its norm layers, until the run has measured it in
    updates of several micro-batches."""
    ema_epochs: PositiveFloat = 0.5
    """Time constant, in epochs, of the separate moving averages of tr(Σ) and |G|²."""
    preconditioned: bool = False
    """For Adam. true: measure the gradient after Adam's scaling of each element. false: measure the gradient itself."""
    per_layer_group: bool = False
    """Also record B_simple for each child module of the network."""


class EvaluationSection(Section):
    """`[evaluation]`: evaluation of the whole validation set or, without one, of the whole test set."""

    every_epochs: PositiveFloat = 1.0
    """Epochs between evaluations; one more follows at the end."""
    batch_size: PositiveInt = 500
    """Samples of one forward pass on a rank."""


class CheckpointSection(Section):
    """`[checkpoint]`: how often checkpoints are written and how many are kept."""

    every_epochs: PositiveFloat = 1.0
    """Epochs between checkpoints. A checkpoint is also written at every phase boundary, at a stop and at the end."""
    keep: PositiveInt = 3
    """Number of most recent checkpoints to keep. Those of phase boundaries are always kept, except between the parts of
    a phase of an imported schedule."""
    keep_best: Annotated[str, matching(r"val/[a-z]\w*", '"val/loss" or "val/METRIC", such as "val/top1"')] | None = None
    """Also keep the weights of the best evaluation so far, by "val/loss" or a metric of the task on the validation set,
    such as "val/top1". None: do not keep them."""


class ChecksSection(Section):
    """`[checks]`: checks during training against wrong numbers that no error reports."""

    replay_every: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Number of updates from one check to the next. In a check, another rank repeats each rank's share of the update,
    and both must get the same gradient. The checks take about 1 / replay_every of the time. 0: no checks."""


class LoggingSection(Section):
    """`[logging]`: metrics, TensorBoard and the stall timeout."""

    logs_per_epoch: PositiveInt = 20
    """Log records per epoch; each averages the training metrics over N / logs_per_epoch samples."""
    line_every_s: PositiveFloat = 60.0
    """Without a terminal: seconds between two lines of progress, which follow a log record."""
    tensorboard: bool = True
    """Write TensorBoard's event file into `runs/NAME`."""
    observers: Annotated[tuple[Annotated[str, AfterValidator(check_observer)], ...], BeforeValidator(tuples)] = ()
    """Further observers: mlflow, wandb, or your `module:name`."""
    stall_timeout_s: PositiveFloat = 600.0
    """Seconds without progress after which the job ends. After a tenth of it, the run reports which rank stalls."""


class Job(Section):
    """A whole job file. `job_model` returns the subclass with the sections of all policies and triggers."""

    name: RunName
    """Name of the run, whose folder is `runs/NAME`."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the sample order, the augmentation and the initial weights."""
    data: DataSection
    model: ModelSection
    task: TaskSection = TaskSection()
    optim: OptimSection
    schedule: ScheduleBase
    trigger: TriggerBase
    gradient_noise: GradientNoiseSection = GradientNoiseSection()
    update: UpdateSection = UpdateSection()
    layout: LayoutSection = LayoutSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    checks: ChecksSection = ChecksSection()
    logging: LoggingSection = LoggingSection()

    @property
    def micro_batch_limit(self) -> int:
        """Largest micro-batch: samples of one forward and backward pass on one rank."""
        ghost_batch = self.model.ghost_batch
        if self.layout.exact:
            return ghost_batch
        return self.layout.max_micro_batch or max(1, 128 // ghost_batch) * ghost_batch

    @property
    def is_adaptive(self) -> bool:
        """Whether a trigger decides when the batch grows."""
        return self.schedule.is_adaptive

    def deciding(self, num_samples: int) -> dict[str, Any]:
        """Return the keys that affect the final weights; all others may change when a run resumes.

        Args:
            num_samples: N, of the samples to train on.

        Returns:
            dotted key to plain value.
        """
        tree = self.model_dump(mode="json")
        measuring = ("trigger", "gradient_noise") if self.is_adaptive else ()
        flat = {
            f"{section}.{key}": value
            for section in ("data", "model", "task", "optim", "schedule", "update", *measuring)
            for key, value in tree[section].items()
        }
        free = {
            "data.root",
            "data.class_names",
            "data.num_samples",
            "data.pipeline",
            "data.workers",
            "data.channels_last",
        }
        free |= {"gradient_noise.measure", "gradient_noise.per_layer_group"}
        if spec := SOURCES.get(self.data.source):
            free |= {f"data.{key}" for key in spec.confirming_keys}
        if self.is_adaptive:
            flat["evaluation.every_epochs"] = self.evaluation.every_epochs  # a trigger also looks at each evaluation
        counts = {"data.num_samples": num_samples}
        if held_out := num_validation(self.data):
            counts["data.num_validation"] = held_out  # two sizes of the source may leave the same N
        return {"seed": self.seed} | counts | {key: value for key, value in flat.items() if key not in free}

    def completed(self, deciding: Mapping[str, Any]) -> dict[str, Any]:
        """Add the defaults of the keys that did not exist yet when a run was recorded.

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
