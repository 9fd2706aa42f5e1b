"""What tests of clients that keep a model of their own on disk share: their worker, and what it is asked."""

from common.wire import Instruction

CLIENTS = (0, 2)


def worker_of(kind, federation):
    return kind(
        federation.config, teacher=str(federation.teacher.folder), teacher_hash=federation.teacher.hash,
        dataset=federation.data.key, student=federation.pupil.key, student_hash=federation.pupil.hash,
    )  # fmt: skip


def asked(run, number, bases, clients=CLIENTS):
    return Instruction(run, number, "", tuple(clients), tuple(bases), "", "", "", "", "")


def nobody(count):
    return None
