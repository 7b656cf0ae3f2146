"""The table in docs/reliability.md says what the tests prove, all of it and nothing else."""

import ast

from tests.faults import PAGE, faults, marked, page, proofs


def test_the_table_in_the_docs_is_current():
    assert PAGE.read_text() == page(PAGE.read_text()), "run: python -m tests.faults"


def test_the_matrix_is_complete_and_in_order():
    sizes = {"A": 16, "B": 6, "C": 6, "D": 7, "E": 7, "F": 6, "G": 21, "H": 10, "I": 10, "J": 4, "K": 5, "L": 5}
    sizes |= {"M": 3, "N": 6, "O": 7}
    assert [fault.row for fault in faults()] == [
        f"{letter}{n}" for letter in sizes for n in range(1, sizes[letter] + 1)
    ]


def test_every_marked_row_exists():
    assert set(proofs()) <= {fault.row for fault in faults()}


def test_every_row_has_a_test_or_a_reason_and_never_both():
    proven = proofs()
    assert [fault.row for fault in faults() if (fault.row in proven) == (fault.open is not None)] == []


def test_no_two_reasons_are_the_same():
    reasons = [fault.open for fault in faults() if fault.open]
    assert len(reasons) == len(set(reasons))


def test_the_rows_of_the_first_release_are_proven():
    proven = proofs()
    assert [fault.row for fault in faults() if fault.first and fault.row not in proven] == []


def test_marks_are_found_on_tests_and_on_modules():
    tree = ast.parse("""
pytestmark = [pytest.mark.slow, pytest.mark.fault("A1")]
@pytest.mark.parametrize("x", [1])
@pytest.mark.fault("B1", "B2")
def test_one(x): ...
def test_two(): ...
def helper(): ...
""")
    assert marked(tree) == [("test_one", ["A1", "B1", "B2"]), ("test_two", ["A1"])]
