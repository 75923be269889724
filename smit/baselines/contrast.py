"""InfoNCE: tell one's own key from all others, in two forms. Needs torch alone.

    N queries   C channels   K keys of a queue

Both compute in float32, also under autocast, and take no norm: give unit vectors to compare
cosines.
"""
import torch
from torch.nn import functional as F


def info_nce(queries, keys, temperature):
    """Contrast each query with all keys of the batch: -log softmax of its own [CPC Eq. 4].

    queries, keys (N, C), row n of both belonging together. ln N where nothing is known.
    """
    with torch.autocast(queries.device.type, enabled=False):
        scores = queries.float() @ keys.float().T / temperature             # (N, N)
    own = torch.arange(len(scores), device=scores.device)
    return F.cross_entropy(scores, own)


def info_nce_queue(queries, keys, queue, temperature):
    """Contrast each query with its key and a queue of older keys [MoCo Alg. 1].

    queries, keys (N, C); queue (K, C).
    """
    with torch.autocast(queries.device.type, enabled=False):
        own = (queries.float() * keys.float()).sum(dim=1, keepdim=True)     # (N, 1)
        others = queries.float() @ queue.float().T                          # (N, K)
        scores = torch.cat([own, others], dim=1) / temperature
    first = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
    return F.cross_entropy(scores, first)
