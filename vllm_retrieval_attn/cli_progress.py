# SPDX-License-Identifier: Apache-2.0
"""The progress bar of commands that count what is done."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


def counting_progress(console: Console) -> Progress:
    """Description, bar, done of total, time."""
    text = TextColumn("{task.description}")
    return Progress(SpinnerColumn(), text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console)
