"""A captured request, and the part of its rows that the host knows before the verdict."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from aurora_vllm.transport.rows import META_WORDS, Field, RowFlag

# Plain integers: indexing with a member of an IntEnum costs a method call each time.
(_REQUEST_LOW, _REQUEST_HIGH, _FLAGS, _POSITION, _TOKEN, _STEP, _DRAFT_INDEX, _NUM_DRAFTS, _EMITTED,
 _DRAFT_VERSION, _PROMPT_LENGTH, _TEMPERATURE_MILLI) = (int(word) for word in Field)  # fmt: skip


@dataclass
class OpenRequest:
    """One request from its first step to its end."""

    key: int  # the random 62-bit number the learner knows the request by
    prompt_length: int
    temperature_milli: int
    wrote: bool = False  # whether rows of it were written to the ring
    dropped: bool = False
    _decoding: dict[int, array[int]] = field(default_factory=dict)  # rows of a decode step, by its number of drafts

    def rows(self, before: int, drafts: int, emits: bool) -> array[int]:
        """Metadata words of the request's rows in a step: ``before`` rows, that of the last certain token, and one for
        each draft token. Do not modify the array: the next such step gets the same one.

        EMITTED is -1 where nothing is emitted whatever the verdict, else 0; FLAGS is REJECTED for every draft token.
        Words that all rows of a step share, and words that only the device knows, are 0.

        Returns:
            int32 [before + 1 + drafts, 16], flat.
        """
        decodes = emits and not before
        if decodes and drafts in self._decoding:
            return self._decoding[drafts]
        words = self._words()
        words[_DRAFT_INDEX], words[_NUM_DRAFTS], words[_EMITTED] = -1, drafts, -1
        words[_PROMPT_LENGTH], words[_TEMPERATURE_MILLI] = self.prompt_length, self.temperature_milli
        rows = array("i", words) * before
        words[_EMITTED] = 0 if emits else -1
        rows.extend(words)
        words[_FLAGS] = int(RowFlag.REJECTED)
        for draft in range(drafts):
            words[_DRAFT_INDEX] = draft
            rows.extend(words)
        if decodes:
            self._decoding[drafts] = rows
        return rows

    def end_row(self, step: int) -> array[int]:
        """Metadata words of the request's end row. int32 [16]"""
        words = self._words()
        words[_FLAGS] = int(RowFlag.END | (RowFlag.DROPPED if self.dropped else RowFlag.NONE))
        words[_STEP] = step
        return array("i", words)

    def _words(self) -> list[int]:
        words = [0] * META_WORDS
        words[_REQUEST_LOW], words[_REQUEST_HIGH] = self.key & 0x7FFFFFFF, self.key >> 31  # two non-negative int32
        return words
