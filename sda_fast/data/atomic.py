"""Old home of `sda_fast.atomic`."""

from sda_fast.atomic import *  # noqa: F403
