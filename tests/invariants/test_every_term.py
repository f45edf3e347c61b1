"""Every check, of student_aware with every term on. (A file of its own: files are what the workers share out.)"""

from tests.invariants.cases import Language


class TestEveryTerm(Language):
    name = "every"
