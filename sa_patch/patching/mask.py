"""What a patched model hands to its layers in place of a dense mask.

transformers builds one mask per forward pass and gives it to every layer. Ours stays O(n): it
carries the padding and the offset of the queries, derives the rows' spans once, and builds the
stock mask only if a layer that is not sparse asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from sa_patch.errors import UserError
from sa_patch.kernels import Spans
from sa_patch.patching.documents import (
    Documents,
    document_numbers,
    documents_of_lengths,
    documents_of_numbers,
    is_plain_causal,
    mask_within,
)
from sa_patch.patching.layers import beyond_own_window

OUTSIDE_OF_GRAPHS = (
    "sa_patch computes attention behind cached keys, of padding-free batches and for caches that "
    "keep less than all outside of compiled graphs; leave fullgraph=True out, or compile prefills"
)
"""Why torch.compile breaks its graph; it stands in the error where it may not."""

_NO_ARGUMENTS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Packing:
    """How the rows of a batch become right-padded.

    Args:
        spans: lengths and first query positions of the right-padded rows, or of the documents that
            rows without padding hold.
        key_order: int64 ``[batch, n]``, the column of each right-padded key; None where the
            rows are right-padded already.
        query_order: int64 ``[batch, nq]``, likewise for the queries.
    """

    spans: Spans
    key_order: Tensor | None
    query_order: Tensor | None

    @classmethod
    def of(cls, padding: Tensor | None, batch: int, query_offset: int, query_len: int) -> Packing:
        """Read the padding mask, bool ``[batch, n]`` and True at real tokens, or None."""
        total = query_offset + query_len
        if padding is None:
            return cls(Spans((total,) * batch, (query_offset,) * batch), None, None)
        lengths = padding.sum(1)
        starts = padding[:, :query_offset].sum(1)
        spans = Spans(tuple(lengths.tolist()), tuple(starts.tolist()))
        columns = torch.arange(total, device=padding.device)
        if bool((padding == (columns < lengths[:, None])).all()):
            return cls(spans, None, None)
        # A stable sort keeps the real tokens in order and moves the padding behind them.
        key_order = torch.argsort(~padding, dim=1, stable=True)
        query_order = torch.argsort(~padding[:, query_offset:], dim=1, stable=True)
        return cls(spans, key_order, query_order)

    @classmethod
    def compact(cls, batch: int, key_len: int, query_len: int) -> Packing:
        """Rows of equal length without padding, whose queries are the last tokens."""
        return cls(Spans((key_len,) * batch, (key_len - query_len,) * batch), None, None)

    def pack(self, x: Tensor, order: Tensor | None) -> Tensor:
        """Reorder ``x [batch, heads, m, head_dim]`` by one of the orders."""
        if order is None:
            return x
        index = order[:, None, :, None].to(x.device)
        return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))

    def unpack(self, x: Tensor) -> Tensor:
        """Put the rows of a result back where their queries came from."""
        if self.query_order is None:
            return x
        index = self.query_order.argsort(dim=1)[:, None, :, None].to(x.device)
        return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))


class SparseMask:
    """The mask of one forward pass, as every layer of a patched model receives it.

    Attributes:
        query_offset: number of keys before the first query.
        key_len: keys that are in use, cached and new; a static cache holds more.
        cached, tokens: keys before the pass, and what it reads; `query_offset` and `query_len`,
            unless the mask is of its last queries alone.
    """

    # transformers passes a mask of four dimensions on as already prepared.
    ndim = 4

    def __init__(self, arguments: dict[str, Any]):
        self.query_offset = int(arguments.get("q_offset", 0))
        # A static cache counts its tokens in place, and a stock mask may be built after that.
        self._arguments = {**arguments, "q_offset": self.query_offset}
        self._stock: dict[str, Any] = {}
        self._packing: Packing | None = None
        self._left_padding: tuple[bool, Tensor | None] | None = None
        self._read: tuple[str | None, Documents | None] | None = None
        self._given: tuple[Tensor, Documents] | None = None
        self.query_len: int = arguments["q_length"]
        self.key_len = self.query_offset + self.query_len
        self.cached, self.tokens = self.query_offset, self.query_len

    @classmethod
    def causal(cls, batch: int, seq_len: int, device: torch.device) -> SparseMask:
        """The mask of a prefill without padding, for callers other than transformers."""
        return cls(
            {
                "batch_size": batch,
                "q_length": seq_len,
                "mask_function": causal_mask_function,
                "device": device,
            }
        )

    @property
    def refusal(self) -> str | None:
        """Why no sparse layer can serve this call; None where it can."""
        return self._read_function()[0]

    def _read_function(self) -> tuple[str | None, Documents | None]:
        """Why the mask function cannot be served, and the documents that it tells apart."""
        if self._read is None:
            self._read = self._refuse()
        return self._read

    def _refuse(self) -> tuple[str | None, Documents | None]:
        if int(self._arguments.get("kv_offset", 0)) != 0:
            return (
                "the layer's own sliding-window cache has dropped keys that the pattern may need",
                None,
            )
        function = self._arguments["mask_function"]
        if function is causal_mask_function:
            return None, None
        window = self._arguments.get("local_size")
        if window is not None and self.key_len > window:
            return beyond_own_window(self._arguments.get("config"), window, self.key_len), None
        rows = (self._arguments["batch_size"], self.key_len, self._arguments["device"])
        if window is not None and is_plain_causal(function, *rows):
            return None, None
        numbers = document_numbers(function, *rows)
        try:
            documents = documents_of_numbers(numbers)
        except UserError as error:
            return str(error), None
        alone = all(len(row) == 1 for row in documents)
        return None, None if alone else documents

    def documents(self, kwargs: Mapping[str, Any]) -> Documents | None:
        """The lengths of the documents in each row, read once per forward pass; None for one each.

        Args:
            kwargs: of a layer's attention, in which padding-free batches have ``cu_seq_lens_q``.

        Raises:
            UserError: for lengths that do not fit, or beside padding or cached keys.
        """
        ends = kwargs.get("cu_seq_lens_q")
        if ends is None:
            return self._read_function()[1]
        if self._given is None or self._given[0] is not ends:
            if self.cached or self._padding() is not None:
                raise UserError(
                    "cu_seq_lens_q does not go with padding or cached keys; give one row of "
                    "documents without attention_mask, and a new cache or none"
                )
            given = documents_of_lengths(
                ends, kwargs.get("cu_seq_lens_k"), self._arguments["batch_size"], self.tokens
            )
            told = self._read_function()[1]
            if told not in (None, given):
                raise UserError(
                    f"position_ids and cu_seq_lens_q tell documents apart differently: {told} and "
                    f"{given} tokens; give either, or both of the same documents"
                )
            self._given = (ends, given)
        return self._given[1]

    def packing(self, kwargs: Mapping[str, Any] = _NO_ARGUMENTS) -> Packing:
        """The rows' spans, read from documents or padding once per forward pass.

        Args, raises: as of `documents`.
        """
        documents = self.documents(kwargs)
        if documents is not None:
            return Packing(Spans.packed(documents), None, None)
        if self._packing is None:
            self._packing = Packing.of(
                self._padding(), self._arguments["batch_size"], self.query_offset, self.query_len
            )
        return self._packing

    def left_padding(self) -> tuple[bool, Tensor | None]:
        """Whether each row's real tokens are its last columns, and how many stand before them.

        Returns:
            True, and int64 ``[batch]`` or None where there is no padding; or False and None.
        """
        if self._left_padding is None:
            padding = self._padding()
            if padding is None:
                self._left_padding = (True, None)
            else:
                hidden = (~padding).sum(1)
                columns = torch.arange(self.key_len, device=padding.device)
                aligned = bool((padding == (columns >= hidden[:, None])).all())
                self._left_padding = (aligned, hidden if aligned else None)
        return self._left_padding

    def _padding(self) -> Tensor | None:
        """bool ``[batch, key_len]``, True at real tokens; None where all are real."""
        padding = self._arguments.get("attention_mask")
        if padding is None:
            return None
        padding = padding[:, : self.key_len].bool()
        missing = self.key_len - padding.shape[1]
        if missing > 0:
            padding = torch.nn.functional.pad(padding, (0, missing))
        return None if bool(padding.all()) else padding

    def stock(self, implementation: str, kwargs: Mapping[str, Any] = _NO_ARGUMENTS) -> Any:
        """The mask that transformers would have built for another attention implementation.

        Documents that only ``cu_seq_lens_q`` tells apart stay apart under every implementation,
        though transformers itself sees to that under FlashAttention alone.
        """
        if implementation not in self._stock:
            arguments = self._arguments
            told = kwargs.get("cu_seq_lens_q") is None or self._read_function()[1]
            documents = None if told else self.documents(kwargs)
            if documents is not None:
                within = mask_within(documents, arguments["device"])
                arguments = arguments | {"mask_function": within, "allow_is_causal_skip": False}
            build = ALL_MASK_ATTENTION_FUNCTIONS[implementation]
            self._stock[implementation] = build(**arguments)
        return self._stock[implementation]

    def __getitem__(self, index: Any) -> SparseMask:
        """The mask of the last m queries, for ``[:, :, -m:, :]``; other indices raise `UserError`.

        Of layers that share the keys of earlier ones Gemma 4 computes no more than these.
        """
        parts = index if isinstance(index, tuple) and len(index) == 4 else (None,) * 4
        start = getattr(parts[2], "start", None)
        if parts != (slice(None), slice(None), slice(start, None), slice(None)):
            raise UserError(
                "this model takes its attention mask apart, which a patched model does not hold as "
                "a tensor; it cannot be patched: unpatch_model(model)"
            )
        if not start or start <= -self.query_len:
            return self
        count = -start if start < 0 else self.query_len - start
        places = {"q_length": count, "q_offset": self.key_len - count}
        # A mask that sdpa leaves out would show the last query a static cache's empty places.
        last = SparseMask(self._arguments | places | {"allow_is_causal_skip": False})
        last.cached, last.tokens = self.cached, self.tokens
        return last

    def contiguous(self) -> SparseMask:
        """What generation asks of a mask it has prepared for a static cache."""
        return self

    def to(self, device: Any, *args: Any, **kwargs: Any) -> SparseMask:
        """This mask for a layer on another device: only stock masks depend on where they are."""
        target = torch.device(device) if not isinstance(device, torch.device) else device
        if torch.device(self._arguments["device"]) == target:
            return self
        moved = SparseMask.__new__(SparseMask)
        moved.__dict__.update(self.__dict__)
        moved._arguments = {
            key: value.to(target) if isinstance(value, Tensor) else value
            for key, value in self._arguments.items()
        } | {"device": target}
        moved._stock = {
            key: value.to(target) if isinstance(value, Tensor) else value
            for key, value in self._stock.items()
        }
        return moved


def sparse_mask(**arguments: Any) -> SparseMask:
    """The mask function registered with transformers' ``AttentionMaskInterface``."""
    prepared = arguments.get("attention_mask")
    if isinstance(prepared, SparseMask):
        return prepared
    return SparseMask(arguments)
