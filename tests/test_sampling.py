"""Orders: which blocks they need, and which samples an order has no fresh claim on."""

from pipeline.sampling import Order, blocks_of, missing_blocks, order_of, place_order, post_hoc_samples, read_orders
from pipeline.spec import Block, BlockLengths, load_spec
from pipeline.store import FolderStore

LENGTHS = BlockLengths(selection=10, estimation=100)


def order(samples, n=200, **changes):
    return Order(samples=list(samples), n0=10, n=n, **{"alpha": 0.001, **changes})


def test_blocks_cover_every_draw_once():
    blocks = list(blocks_of(order([3, 5], n=300), LENGTHS))
    assert len(set(blocks)) == len(blocks) == 2 * (1 + 3)
    for sample in (3, 5):
        draws = [
            j
            for b in blocks
            if b.sample == sample and b.stage == "estimation"
            for j in range(b.draw_start, b.draw_stop)
        ]
        assert draws == list(range(300))


def test_growing_needs_only_what_is_missing():
    standing = set(blocks_of(order([0], n=200), LENGTHS))
    assert missing_blocks(order([0], n=200), LENGTHS, standing) == []
    assert missing_blocks(order([0], n=300), LENGTHS, standing) == [Block(0, "estimation", 200, 300)]
    assert {block.sample for block in missing_blocks(order([0, 1]), LENGTHS, standing)} == {1}


def test_orders_are_numbered_and_equal_ones_are_one(tmp_path):
    store = FolderStore(str(tmp_path))
    assert [place_order(store, one) for one in (order([0]), order([0, 1]), order([0]))] == ["001", "002", "001"]
    assert list(read_orders(store)) == ["001", "002"]


def test_post_hoc_is_said_of_second_looks_only(tmp_path):
    store = FolderStore(str(tmp_path))
    names = [
        place_order(store, one)
        for one in (
            order([0, 1]),
            order([0, 1, 2]),
            order([1, 2, 3], n=400),
            order([0, 3], alpha=0.01),
            order([9], n=400),
        )
    ]
    orders = read_orders(store)
    assert [post_hoc_samples(orders, name) for name in names] == [set(), set(), {1, 2}, {0, 3}, set()]


def test_order_of_a_spec(raw_spec):
    found = order_of(load_spec(raw_spec), range(2))
    assert (found.samples, found.n0, found.n, found.alpha) == ([0, 1], 50, 200, 0.001)
