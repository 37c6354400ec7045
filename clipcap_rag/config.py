"""Frozen configuration dataclasses: JSON in and out, every field with its help and unit, contradictions refused."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

from clipcap_rag.errors import InputError


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field with its documentation; commands make their flags from it."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise InputError(sentence)


class Config:
    """What all configurations share: a check of choices and the way to JSON and back."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            choices, value = field.metadata.get("choices"), getattr(self, field.name)
            if choices and value not in choices:
                raise InputError(f"{field.name} is {value!r}; choose one of {', '.join(choices)}")

    def to_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Settings that are missing, as older releases did not have them, take their defaults.

        Raises:
            InputError: a key that this release does not know.
        """
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        _require(not unknown, f"{cls.__name__} does not fit this release: unknown {unknown}; install a newer one")
        return cls(**values)

    def replaced(self, **values: Any) -> Self:
        """A copy with other values; raises InputError for a name that is no setting."""
        names = [field.name for field in dataclasses.fields(self)]
        for name in values:
            _require(name in names, f"{name} is no setting of {type(self).__name__}; choose among {', '.join(names)}")
        return dataclasses.replace(self, **values)


@dataclass(frozen=True)
class ModelConfig(Config):
    """The shape of a captioner; `clip_dim` and `lm_dim` follow from the two models and are filled in by the builder."""

    mapper: str = option("retrieval", "mapper from embeddings to prefix", ("retrieval", "transformer", "mlp", "linear"))
    prefix_length: int = option(10, "prefix vectors given to the language model (P)")
    clip_length: int = option(10, "tokens that the image embedding is unfolded into (C)")
    mapper_layers: int = option(8, "transformer layers of the mapper")
    mapper_heads: int = option(8, "attention heads of the mapper")
    mapper_dropout: float = option(0.0, "dropout probability inside the mapper")
    language_model_tuning: str = option(
        "full",
        "what of the language model learns; layers is all but its token embeddings, so that words which no training "
        "caption has stay sayable",
        ("frozen", "lora", "layers", "full"),
    )
    lora_rank: int = option(8, "rank of the LoRA matrices")
    normalize: bool = option(True, "give the mapper unit-length image embeddings instead of raw ones")
    clip_dim: int = option(0, "width of the CLIP embedding space (D)")
    lm_dim: int = option(0, "width of the language model (E)")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.prefix_length >= 1, f"prefix_length is {self.prefix_length}; it must be at least 1")
        _require(self.clip_length >= 1, f"clip_length is {self.clip_length}; it must be at least 1")
        _require(self.mapper_layers >= 1, f"mapper_layers is {self.mapper_layers}; it must be at least 1")
        _require(
            self.mapper in ("mlp", "linear") or self.lm_dim % self.mapper_heads == 0,
            f"mapper_heads {self.mapper_heads} does not divide the language model's width {self.lm_dim}; "
            "choose a divisor",
        )
        _require(0 <= self.mapper_dropout < 1, f"mapper_dropout is {self.mapper_dropout}; it must be in [0, 1)")
        _require(self.lora_rank >= 1, f"lora_rank is {self.lora_rank}; it must be at least 1")

    @property
    def tunes_language_model(self) -> bool:
        """Whether the language model's own weights learn, and so belong to the checkpoint."""
        return self.language_model_tuning in ("layers", "full")


@dataclass(frozen=True)
class GenerationConfig(Config):
    """How candidate captions are written and ordered."""

    decoding: str = option(
        "sample",
        "sample and rerank, beam search, greedy, or ClipCap's own rule (beam search; greedy with 1 beam)",
        ("sample", "beam", "greedy", "clipcap"),
    )
    candidates: int = option(
        16, "captions per image to rerank: of a beam search (num_beams, at most a third of them), the rest sampled"
    )
    top_p: float = option(0.9, "nucleus: sample from the likeliest tokens that together have this probability")
    temperature: float = option(0.7, "softmax temperature of sampling; smaller is safer, larger more varied")
    num_beams: int = option(5, "beams of beam search, ordered by mean log-probability and agreement; 1 is greedy")
    max_new_tokens: int = option(0, "longest caption, in language-model tokens; 0 is 40, with clipcap 67")
    log_probability_weight: float = option(
        15.0, "weight of a candidate's mean log-probability per token (nats) beside logit_scale x CLIP similarity"
    )
    agreement_weight: float = option(
        800.0,
        "likewise, of a candidate's agreement (0 to 1) in n-grams with its neighbours' captions; for models that "
        "retrieve more neighbours than their mapper is shown",
    )
    prompt: str = option("", "words that every caption starts with; the model continues them")
    retrieved_text: str = option(
        "auto",
        "what the neighbours' words do: nothing, stand before the caption (for a model trained with --text-neighbors), "
        "or raise the probability of what they say; auto is prompt for such a model, bias for one that retrieves more "
        "neighbours than its mapper is shown, else off",
        ("auto", "off", "prompt", "bias"),
    )
    bias_strength: float = option(
        1.0,
        "with bias: how much words and runs of tokens that the neighbours share are raised; 1 raises a word that no "
        "training caption had by the logarithm of how much more frequent it is among them than in the index",
    )
    new_word_share: float = option(
        0.2,
        "with bias: weight of the neighbours that have a word never trained on from which its bonus is whole; 0.01 "
        "names more of what only the index knows, and says more that is wrong",
    )
    seed: int = option(0, "seed of sampling; a caption depends on the seed and its image alone")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.candidates >= 1, f"candidates is {self.candidates}; it must be at least 1")
        _require(self.num_beams >= 1, f"num_beams is {self.num_beams}; it must be at least 1")
        _require(self.max_new_tokens >= 0, f"max_new_tokens is {self.max_new_tokens}; it must be 0 or more")
        _require(
            self.log_probability_weight >= 0,
            f"log_probability_weight is {self.log_probability_weight}; it must be 0 or more",
        )
        _require(self.agreement_weight >= 0, f"agreement_weight is {self.agreement_weight}; it must be 0 or more")
        _require(self.bias_strength >= 0, f"bias_strength is {self.bias_strength}; it must be 0 or more")
        _require(
            0 < self.new_word_share <= 1, f"new_word_share is {self.new_word_share}; it must be above 0, at most 1"
        )
        _require(0 < self.top_p <= 1, f"top_p is {self.top_p}; it must be above 0 and at most 1")
        _require(self.temperature > 0, f"temperature is {self.temperature}; it must be above 0 (or use greedy)")
        _require(self.seed >= 0, f"seed is {self.seed}; it must be 0 or more")

    @property
    def longest(self) -> int:
        """The most tokens that a caption has."""
        return self.max_new_tokens or (67 if self.decoding == "clipcap" else 40)

    @property
    def candidate_beams(self) -> int:
        """How many of the captions that are to be reranked come from a beam search; 1 is the greedy one."""
        return 1 if self.decoding == "greedy" else max(1, min(self.num_beams, self.candidates // 3))

    @property
    def captions_per_image(self) -> int:
        """How many are written; equal ones are merged afterwards."""
        return {"greedy": 1, "sample": self.candidates}.get(self.decoding, self.num_beams)


@dataclass(frozen=True)
class TrainConfig(Config):
    """The optimisation, and the bad retrieval that the model is trained to survive."""

    epochs: int = option(10, "passes over the captions")
    batch_size: int = option(40, "captions per optimiser step and accumulation part")
    accumulate: int = option(1, "batches whose gradients make one optimiser step")
    learning_rate: float = option(2e-4, "peak learning rate of AdamW for the mapper")
    lm_learning_rate: float = option(5e-5, "peak learning rate of AdamW for the language model")
    weight_decay: float = option(0.01, "AdamW weight decay of matrices")
    warmup: float = option(
        0.05, "batches in which the learning rate rises: below 1 a part of the training, from 1 on their number"
    )
    schedule: str = option("cosine", "how the learning rate falls to 0 afterwards", ("cosine", "linear"))
    gradient_clip: float = option(1.0, "largest gradient norm; 0 leaves gradients alone")
    max_caption_tokens: int = option(40, "longest caption that is trained on, in tokens; the rest is cut")
    seed: int = option(0, "seed of weights, order and retrieval noise")
    validation_fraction: float = option(0.05, "part of the images, chosen by hash of image_id, kept for validation")
    validation_images: int = option(500, "at most this many validation images are captioned for greedy CIDEr")
    patience: int = option(3, "epochs without a better validation CIDEr before training stops; 0 never stops early")
    neighbor_pool: int = option(50, "nearest captions stored per image, from which neighbours are drawn (K_max)")
    max_neighbors: int = option(8, "most neighbours shown to the mapper")
    num_neighbors: int = option(
        100, "neighbours retrieved in use; the words of those that the mapper is not shown help to write and to rank"
    )
    retrieval_dropout: float = option(0.15, "probability that a caption is trained with no neighbours at all")
    vary_neighbors: float = option(0.5, "probability of fewer neighbours than max_neighbors, uniform from 1")
    pool_sampling: float = option(0.5, "probability of top 1 plus a sample of the pool instead of the nearest")
    random_neighbors: float = option(0.1, "probability that a neighbour is replaced by a random caption of the index")
    neighbor_noise: float = option(0.0, "length of the Gaussian noise added to a neighbour embedding of length 1")
    image_noise: float = option(0.0, "length of the Gaussian noise added to an image embedding, relative to its own")
    text_neighbors: int = option(0, "most neighbours whose words stand before the caption; 0 trains without words")
    text_dropout: float = option(0.3, "probability that a batch is trained without its neighbours' words")
    text_epochs: int = option(1, "with --text-index: passes over its captions, as if they were photos, at first")
    reward_epochs: int = option(0, "passes over the photos at last that raise the CIDEr of sampled captions")
    reward_samples: int = option(5, "captions per photo that are compared, the greedy one among them")
    reward_learning_rate: float = option(5e-5, "peak learning rate of AdamW in those passes")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "accumulate", "max_caption_tokens", "neighbor_pool"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("validation_fraction", "retrieval_dropout", "vary_neighbors", "pool_sampling", "random_neighbors",
                     "text_dropout"):  # fmt: skip
            _require(0 <= getattr(self, name) <= 1, f"{name} is {getattr(self, name)}; it must be between 0 and 1")
        for name in ("seed", "epochs", "text_epochs", "reward_epochs", "validation_images", "patience", "max_neighbors",
                     "weight_decay", "gradient_clip", "neighbor_noise", "image_noise", "text_neighbors"):  # fmt: skip
            _require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must be 0 or more")
        _require(
            0 <= self.warmup < 1 or (self.warmup > 0 and float(self.warmup).is_integer()),
            f"warmup is {self.warmup}; give a part of the training below 1 or a whole number of batches",
        )
        _require(self.reward_samples >= 2, f"reward_samples is {self.reward_samples}; it must be at least 2")
        for name in ("learning_rate", "lm_learning_rate", "reward_learning_rate"):
            _require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be above 0")
        _require(
            self.max_neighbors <= self.neighbor_pool,
            f"max_neighbors {self.max_neighbors} exceeds neighbor_pool {self.neighbor_pool}; raise the pool",
        )
        _require(
            self.num_neighbors >= self.max_neighbors,
            f"num_neighbors {self.num_neighbors} is below max_neighbors {self.max_neighbors}; raise it",
        )
        _require(
            self.text_neighbors <= self.max_neighbors,
            f"text_neighbors {self.text_neighbors} exceeds max_neighbors {self.max_neighbors}; raise that",
        )

    @property
    def raises_words(self) -> bool:
        """Whether the neighbours' words raise what is written, rather than stand before it."""
        return self.num_neighbors > self.max_neighbors and not self.text_neighbors


@dataclass(frozen=True)
class IndexConfig(Config):
    """How a caption index is searched."""

    index_key: str = option("auto", "auto, Flat, or a FAISS factory key such as IVF4096,Flat or HNSW32")
    index_memory: float = option(
        0.0, "memory for building the search structure, in GB; 0 is 60 percent of the free one"
    )
    index_latency: float = option(10.0, "longest time one query may take, in milliseconds, when FAISS tunes itself")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(bool(self.index_key), "index_key is empty; use auto, Flat, IVF... or HNSW...")
        _require(self.index_memory >= 0, f"index_memory is {self.index_memory}; it must be 0 or more GB")
        _require(self.index_latency > 0, f"index_latency is {self.index_latency}; it must be above 0 ms")


IMPORT_FORMATS = ("auto", "antarctic", "clip-grams", "clip-retrieval", "parquet")
EXPORT_FORMATS = ("antarctic", "clip-retrieval")


@dataclass(frozen=True)
class ImportConfig(Config):
    """How an index of another project is read."""

    format: str = option("auto", "whose layout it is", IMPORT_FORMATS)
    caption_column: str | None = option(None, "Parquet column of the captions; default: a usual name")
    embedding_column: str | None = option(None, "Parquet column of the embeddings; default: a usual name")
    template: str | None = option(
        None, "sentence that the captions were encoded in, {} in their place; default: the prefix that clip-grams wrote"
    )
    reencode: bool = option(False, "encode the captions also where embeddings are stored")


@dataclass(frozen=True)
class RetrievalConfig(Config):
    """Which captions of the indexes may be retrieved, and how they are looked for."""

    route: str = option(
        "auto",
        "nearest captions (text), captions of the nearest photos of an index that holds such (image), both in turn, or "
        "auto: the nearest captions, and captions of the nearest photos have a say in words and ranking",
        ("auto", "text", "image", "both"),
    )
    where: tuple[str, ...] = option(
        (),
        "FIELD=VALUE: retrieve only captions whose source, meta.KEY, image_id, caption_id or caption is VALUE; may be "
        "repeated: either value of one field, all of different fields",
    )
    deny: str = option(
        "", "file of words, phrases and captions, one a line; what contains one, whole words in order, is not retrieved"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            not isinstance(self.where, str), f"where is {self.where!r}; give a list of conditions such as source=wiki"
        )
        object.__setattr__(self, "where", tuple(self.where))


STUDIES = ("table", "robustness", "decoding", "leaks")


@dataclass(frozen=True)
class EvaluationConfig(Config):
    """What is measured, and on how many photos."""

    studies: str = option(
        "table",
        "what to measure, separated by commas: table (each index, none and baselines), robustness (worse and worse "
        "neighbours, and how many), decoding (greedy, beams, samples and their time), leaks (what an index knows of "
        "the photos)",
    )
    decodings: str = option("greedy,beam,sample", "decodings to compare, separated by commas")
    random_neighbors: bool = option(False, "in the table, also random captions of the first index as neighbours")
    together: bool = option(False, "in the table, also all indexes at once")
    rerank_sweep: bool = option(False, "in the table, also the samples under other log-probability weights")
    candidate_sizes: str = option("4,16,64,256,1000", "in the decoding study, numbers of samples, separated by commas")
    same_photo: float = option(0.95, "in the leak study, cosine of image embeddings above which two photos are one")
    images: int = option(0, "evaluate the first so many photos only; 0 takes all")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.names():
            GenerationConfig(decoding=name)
        for name in self.chosen_studies():
            _require(name in STUDIES, f"there is no study {name!r}; choose among {', '.join(STUDIES)}")
        _require(
            all(size.strip().isdecimal() and int(size) for size in self.candidate_sizes.split(",")),
            f"candidate_sizes is {self.candidate_sizes!r}; give numbers from 1, separated by commas",
        )
        _require(0 < self.same_photo < 1, f"same_photo is {self.same_photo}; it must be between 0 and 1")
        _require(self.images >= 0, f"images is {self.images}; it must be 0 or more")

    def names(self) -> list[str]:
        """The decodings one by one."""
        return [name.strip() for name in self.decodings.split(",")]

    def chosen_studies(self) -> list[str]:
        """The studies one by one."""
        return list(dict.fromkeys(name.strip() for name in self.studies.split(",")))

    def sizes(self) -> list[int]:
        """The numbers of samples one by one."""
        return [int(size) for size in self.candidate_sizes.split(",")]


@dataclass(frozen=True)
class DownloadConfig(Config):
    """How photos are fetched from the web, and which of them are kept."""

    threads: int = option(32, "photos fetched and decoded at a time")
    connect_timeout: float = option(10.0, "seconds that a server may take to be reached")
    read_timeout: float = option(15.0, "seconds that a server may be silent")
    total_timeout: float = option(60.0, "seconds for one URL in all: redirects, further tries and pauses included")
    retries: int = option(2, "further tries after a timeout, a cut connection or a passing server error")
    max_megabytes: float = option(32.0, "largest file that is fetched, in MB")
    min_side: int = option(64, "shortest side of a photo that is kept, in pixels")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("threads", "min_side"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("connect_timeout", "read_timeout", "total_timeout", "max_megabytes"):
            _require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be above 0")
        _require(self.retries >= 0, f"retries is {self.retries}; it must be 0 or more")
