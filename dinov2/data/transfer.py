"""Batches to the training device, one ahead: a copy to a GPU runs beside the step before it."""

from collections.abc import Iterable, Iterator

import torch

from dinov2.data.loaders import SampleBatch


def sent_ahead(batches: Iterable[SampleBatch], device: torch.device) -> Iterator[SampleBatch]:
    """The same batches with their pictures on `device`.

    To a GPU they are copied on a stream of their own, from pinned memory without the host waiting, while the kernels of
    the batch before still run; a batch is given out when the next one has been sent. On a CPU nothing is copied.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch._replace(images=batch.images.to(device))
        return
    stream = torch.cuda.Stream(device)
    ahead: SampleBatch | None = None
    copied = torch.cuda.Event()
    for batch in batches:
        if ahead is not None:
            yield _arrived(ahead, copied)
        with torch.cuda.stream(stream):
            ahead = batch._replace(images=batch.images.to(device, non_blocking=True))
            copied = stream.record_event()
    if ahead is not None:
        yield _arrived(ahead, copied)


def _arrived(batch: SampleBatch, copied: torch.cuda.Event) -> SampleBatch:
    # The stream that computes waits, not the host; and the memory is not given away before that stream is done with it
    current = torch.cuda.current_stream(batch.images.device)
    current.wait_event(copied)
    batch.images.record_stream(current)
    return batch
