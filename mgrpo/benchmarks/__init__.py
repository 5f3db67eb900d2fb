"""Question sets and benchmarks: local files read into questions, their splits and checks, and the figures of repeats.

Nothing is fetched; encrypted sets are decrypted in memory only. See docs/benchmarks.md.
"""

from __future__ import annotations

from mgrpo.benchmarks.question_file import QuestionFile, QuestionFileConfig
from mgrpo.benchmarks.question_set import QuestionSet, read_questions
from mgrpo.benchmarks.questions import write_questions

__all__ = ["QuestionFile", "QuestionFileConfig", "QuestionSet", "read_questions", "write_questions"]
