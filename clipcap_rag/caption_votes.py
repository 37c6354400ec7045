"""How much each retrieved caption says about what a photo shows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

_SHARPNESS = 2.0  # of the kernel exp(2 cosine - 2) = exp(-distance²) of embeddings
_NOISE = 1.0  # variance of what a photo's captions say beside what its looks tell, in units of the kernel
_TRUNK_SHARPNESS, _TRUNK_NOISE = 3.0, 0.5  # the same for features of the trunk: kernel exp(3 cosine - 3)
_LEAST_SPREAD = 1e-3  # of a feature, in units of the mean of all
_BESIDE_PHOTOS = 0.05  # what captions that match by their own words count for where captions of photos vote too
_USUAL = 16  # captions that say what is usual and count beside those that match, so that few raise little
_OUTLIER = 5.0  # standard deviations by which a match stands out; of 100 neighbours the best does for 2 % of photos
_MOST = 4.0  # nats that a match may weigh more than another
_SPREAD = 0.005  # least standard deviation of cosines


@dataclass(frozen=True)
class Votes:
    """What n captions say about one photo.

    Attributes:
        captions: those that have a say.
        weights: [n], how much each counts; below 0 where it speaks against. They make about 1 in all; what is missing
            counts as what captions usually say.
    """

    captions: Sequence[str] = ()
    weights: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def __iter__(self) -> Iterator[tuple[str, float]]:
        return zip(self.captions, self.weights.tolist(), strict=True)

    def without(self, dropped: frozenset[str]) -> "Votes":
        """The votes of all captions but some."""
        kept = [place for place, caption in enumerate(self.captions) if caption not in dropped]
        return Votes([self.captions[place] for place in kept], self.weights[kept])


def match_weights(scores: np.ndarray) -> np.ndarray:
    """How much each of K captions counts, 1 in all, by their cosines [K] with the photo.

    The same for all, but for a match that stands out by more than 5 standard deviations of the others: it counts for as
    many as exp(its distance beyond that), at most 55. Weights that fall with every cosine wrote worse captions.
    """
    K = len(scores)
    if K < 2:
        return np.ones(K)
    others = (scores.sum() - scores) / (K - 1)
    variance = ((scores**2).sum() - scores**2) / (K - 1) - others**2
    beyond = (scores - others) / np.sqrt(np.maximum(variance, _SPREAD**2)) - _OUTLIER
    weights = np.exp(np.clip(beyond, 0.0, _MOST))
    return weights / weights.sum()


def near_weights(scores: np.ndarray) -> np.ndarray:
    """How much each of K captions counts for a new word, 1 in all: softmax of the standard scores of their cosines.

    Such a word stands in few captions and has no other evidence than how near they are.
    """
    if not len(scores):
        return scores
    weights = np.exp((scores - scores.max()) / max(_SPREAD, scores.std()))
    return weights / weights.sum()


def photo_weights(query: np.ndarray, photos: np.ndarray, trust: np.ndarray) -> np.ndarray:
    """How much what is known of P photos counts for another one: the weights [P] of kernel ridge regression.

    Whatever has a value for every photo, such as the share of its captions that have a word, is estimated for the
    other photo by these weights: the mean of a Gaussian process (Rasmussen and Williams 2006, section 2.2) whose
    kernel is Gaussian, exp(-distance²), fitted to the nearest photos alone. Photos alike share their weight, and one
    weighs less than 0 if it tells in what the others err.

    Args:
        query: [D] of unit length.
        photos: [P, D] of unit length.
        trust: [P], above 0; a photo of more has less noise.
    """
    return _regression(query, photos, _SHARPNESS, _NOISE / trust)


def trunk_weights(query: np.ndarray, photos: np.ndarray, trust: np.ndarray) -> np.ndarray:
    """`photo_weights` by features of the image tower's trunk, each of them standardised over the photos.

    Features that all these photos share so count for nothing, and no other photos are needed to know which these are.

    Args:
        query: [T].
        photos: [P, T]; standardising wants a hundred or more.
        trust: [P], above 0; a photo of more has less noise.
    """
    spread = photos.std(axis=0)
    scale = 1.0 / (spread + _LEAST_SPREAD * spread.mean())
    centre = photos.mean(axis=0)
    near, own = (photos - centre) * scale, (query - centre) * scale
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    return _regression(own / np.linalg.norm(own), near, _TRUNK_SHARPNESS, _TRUNK_NOISE / trust)


def _regression(query: np.ndarray, photos: np.ndarray, sharpness: float, noise: np.ndarray) -> np.ndarray:
    """The weights [P] of photos [P, D] for a query [D], all of unit length: kernel exp(sharpness (cosine - 1))."""
    kernel = np.exp(sharpness * (photos @ photos.T - 1.0)).astype(np.float64)
    kernel[np.diag_indices(len(photos))] += noise
    return np.linalg.solve(kernel, np.exp(sharpness * (photos @ query - 1.0)))


def joint_votes(captions: Sequence[str], scores: np.ndarray, photos: Votes) -> Votes:
    """The votes of K captions that match a photo, by their cosines [K], and those of captions of photos like it.

    Where both are there, the first count for a twentieth, or for more if one stands out.
    """
    if not captions:
        return photos
    K, weights = len(captions), match_weights(scores)
    share = 1.0
    if photos.captions:
        outstanding = 1.0 - K * weights.min()
        share = _BESIDE_PHOTOS + (1.0 - _BESIDE_PHOTOS) * outstanding
    own = share * weights * K / (K + _USUAL)
    return Votes([*captions, *photos.captions], np.concatenate([own, (1.0 - share) * photos.weights]))
