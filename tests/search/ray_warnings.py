"""Warnings of Ray that are not ours."""

import pytest

# Ray 2.60 leaves what it opened of its own processes to the garbage collector, and its defaults announce their successors.
QUIET = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Tip. In future versions of Ray:FutureWarning"),
]
