"""The page pool and the paged cache: ownership, reuse, growth."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llmopt.compiler.errors import CacheError, CacheFullError, InputError
from llmopt.compiler.program import StateSpec
from llmopt.runtime.kv_cache import KVCache, PagePool

PAGE = 4


def make_cache(**options):
    spec = StateSpec("k", (2, PAGE, 3), torch.float32)
    return KVCache([spec], page_size=PAGE, **{"initial_pages": 3, **options})


def test_scratch_is_never_handed_out_and_every_other_page_is():
    pool = PagePool(6)
    assert sorted(pool.take(5)) == [1, 2, 3, 4, 5]
    with pytest.raises(CacheFullError, match="1 pages are wanted, 0 of 6 are free"):
        pool.take(1)


@pytest.mark.parametrize("wrong", [[2, 2], [0], [3], [7]], ids=["twice", "scratch", "not taken", "foreign"])
def test_pages_that_are_not_taken_cannot_be_given_back(wrong):
    pool = PagePool(6)
    taken = pool.take(2)
    assert taken == [1, 2]
    with pytest.raises(CacheError, match=f"page {wrong[-1]} was given back but is not taken"):
        pool.give([1, *wrong])
    assert pool.free == 3
    pool.give(taken)
    assert pool.free == 5
    with pytest.raises(CacheError):
        pool.give([1])


def test_rows_are_reused_and_a_row_is_released_once():
    cache = make_cache()
    first, second = cache.open(), cache.open()
    cache.reserve(first, 1)
    cache.release(first)
    with pytest.raises(CacheError, match="row 0 is no live sequence; live rows are"):
        cache.release(first)
    with pytest.raises(CacheError):
        cache.reserve(first, 1)
    assert (cache.open(), second) == (first, 1)


def test_reserve_says_how_many_tokens_there_is_room_for():
    cache = make_cache()
    row = cache.open()
    assert [cache.reserve(row, n) for n in (0, 1, PAGE, PAGE + 1, 2)] == [0, PAGE, PAGE, 2 * PAGE, 2 * PAGE]


def test_block_tables_are_kept_until_pages_change():
    cache = make_cache()
    row = cache.open()
    cache.reserve(row, PAGE)
    before = cache.block_tables()
    assert cache.block_tables() is before
    cache.reserve(row, PAGE + 1)
    after = cache.block_tables()
    assert after.data_ptr() == before.data_ptr()
    assert after.shape == (1, 8)
    assert after.is_contiguous()
    assert after[0, :2].tolist() == cache.pages(row)


def test_pages_of_a_row_that_was_released_before_it_was_listed_are_forgotten():
    cache = make_cache()
    rows = [cache.open() for _ in range(9)]
    for row in rows:
        cache.reserve(row, 1)
    cache.release(rows[-1])
    assert cache.block_tables()[:, 0].tolist() == [cache.pages(row)[0] for row in rows[:-1]]


def test_growth_doubles_up_to_the_limit_and_failure_changes_nothing():
    cache = make_cache(max_pages=10)
    row, sizes = cache.open(), []
    for pages in range(1, 10):
        cache.reserve(row, pages * PAGE)
        sizes.append(cache.num_pages)
    assert sizes == [3, 3, 6, 6, 6, 10, 10, 10, 10]
    assert not cache.has_room(1)
    held = list(cache.pages(row))
    with pytest.raises(CacheFullError, match=r"1 pages are wanted, 0 of 10 are free .* past 10 pages of 96 bytes"):
        cache.reserve(row, 9 * PAGE + 1)
    assert cache.pages(row) == held


def test_a_byte_budget_is_a_page_limit():
    assert make_cache(max_bytes=96 * 7 + 95).max_pages == 7
    assert make_cache(max_bytes=96 * 7, max_pages=5).max_pages == 5
    with pytest.raises(InputError, match="may hold 1 pages of 96 bytes"):
        make_cache(max_bytes=96)


def test_a_spec_of_another_page_size_is_refused():
    with pytest.raises(InputError, match=r"state v has shape \(2, 8, 3\); wanted \(heads, 16"):
        KVCache([StateSpec("v", (2, 8, 3), torch.float32)])


def test_a_device_without_memory_is_a_full_cache(monkeypatch):
    cache = make_cache()
    row = cache.open()
    cache.reserve(row, 2 * PAGE)

    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(torch.Tensor, "new_zeros", no_memory)
    with pytest.raises(CacheFullError, match="may not grow past 3 pages"):
        cache.reserve(row, 2 * PAGE + 1)
    assert not cache.has_room(1)
    assert len(cache.pages(row)) == 2


def test_near_pages_stand_at_the_end_of_a_row_whatever_its_length():
    cache = make_cache(near_pages=2)
    first, second = cache.open(), cache.open()
    cache.reserve(first, 1)
    near = cache.block_tables()[0, -2:].tolist()
    assert cache.pages_for(PAGE + 1) == 4
    assert cache.reserve(second, 7 * PAGE) == 7 * PAGE
    assert cache.block_tables().shape == (2, 16)
    assert cache.block_tables()[0, -2:].tolist() == near
    assert cache.slots(second, 6 * PAGE, 6 * PAGE + 2) == [cache.pages(second)[6] * PAGE + i for i in range(2)]
    cache.release(second)
    cache.release(first)
    assert cache.free_pages == cache.num_pages - 1


def test_a_cache_without_room_for_near_pages_is_refused():
    with pytest.raises(
        InputError, match=r"hold 4 pages .* at least 5 \(page 0 is scratch, a sequence has 3 near pages\)"
    ):
        make_cache(max_pages=4, near_pages=3)
    cache = make_cache(max_pages=5, near_pages=3)
    row = cache.open()
    with pytest.raises(CacheFullError, match="5 pages are wanted"):
        cache.reserve(row, PAGE + 1)
    assert cache.free_pages == cache.num_pages - 1, "all or none"
    assert cache.reserve(row, PAGE) == PAGE


class Ownership(RuleBasedStateMachine):
    """Random opens, appends and releases; what every live token wrote must be found again, in near pages too."""

    near = 0

    def __init__(self):
        super().__init__()
        self.cache = make_cache(max_pages=24, near_pages=self.near)
        self.beside: dict[int, torch.Tensor] = {}  # what near pages hold
        self.contents: dict[int, list[float]] = {}
        self.written = 0.0

    @rule()
    def open(self):
        row = self.cache.open()
        assert row not in self.contents
        self.contents[row] = []

    @precondition(lambda self: self.contents)
    @rule(data=st.data(), count=st.integers(1, 3 * PAGE))
    def append(self, data, count):
        row = data.draw(st.sampled_from(sorted(self.contents)))
        start = len(self.contents[row])
        wanted = self.cache.pages_for(start + count) - len(self.cache.pages(row)) - (self.near if start else 0)
        fits = wanted <= self.free_and_growable()
        try:
            self.cache.reserve(row, start + count)
        except CacheFullError:
            assert not fits
            return
        assert fits
        for slot in self.cache.slots(row, start, start + count):
            self.written += 1
            self.contents[row].append(self.written)
            self.cache.tensors["k"][slot // PAGE, :, slot % PAGE] = self.written
        self.beside[row] = -self.written - torch.arange(self.near) / 8
        self.cache.tensors["k"][self.near_of(row)] = self.beside[row][:, None, None, None]

    @precondition(lambda self: self.contents)
    @rule(data=st.data())
    def release(self, data):
        row = data.draw(st.sampled_from(sorted(self.contents)))
        self.cache.release(row)
        del self.contents[row]

    def free_and_growable(self):
        return 23 - sum(len(self.cache.pages(row)) + self.near * bool(held) for row, held in self.contents.items())

    def near_of(self, row):
        tables = self.cache.block_tables()
        return tables[row, tables.shape[1] - self.near :]

    @invariant()
    def each_page_has_one_owner_and_none_is_lost(self):
        held = [page for row in self.contents for page in self.cache.pages(row)]
        held += [page for row, tokens in self.contents.items() if tokens for page in self.near_of(row).tolist()]
        assert len(set(held)) == len(held)
        assert all(0 < page < self.cache.num_pages for page in held)
        assert len(held) + self.cache.free_pages == self.cache.num_pages - 1

    @invariant()
    def contents_are_found_through_the_block_tables(self):
        table = self.cache.block_tables()
        pages = self.cache.tensors["k"]
        assert pages.shape[0] == self.cache.num_pages
        for row, contents in self.contents.items():
            at = torch.arange(len(contents))
            found = pages[table[row, at // PAGE], :, at % PAGE]
            assert (found == torch.tensor(contents)[:, None, None]).all()
            if contents:
                assert (pages[self.near_of(row)] == self.beside[row][:, None, None, None]).all()


class OwnershipWithNearPages(Ownership):
    near = 3


TestOwnership, TestNearOwnership = Ownership.TestCase, OwnershipWithNearPages.TestCase
TestOwnership.settings = TestNearOwnership.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
