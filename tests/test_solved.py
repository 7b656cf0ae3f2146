"""Which prompts are always or never solved."""

import msgspec

from tests.groups import make_group
from trainer.solved import Solved


def test_rows_are_sorted_by_what_became_of_all_their_groups_and_this_outlives_a_restart():
    book = Solved()
    for group_id, row, rewards in ((0, 7, [1.0, 1.0]), (1, 3, [0.0, 0.0]), (2, 9, [1.0, 1.0]), (3, 5, [0.0, 1.0])):
        book.add(make_group(group_id, row=row, rewards=rewards))
    assert book.report() == {"always": [7, 9], "never": [3], "sometimes": [5]}
    after = Solved()
    after.restore(msgspec.json.decode(msgspec.json.encode(book.state())))
    after.add(make_group(13, row=9, rewards=[0.0, 0.0]))  # in the next epoch
    assert after.report() == {"always": [7], "never": [3], "sometimes": [5, 9]}
