"""Recommenders on item vectors: training, evaluation, results."""

from sda_fast.recommend.config import RecommendConfig
from sda_fast.recommend.results import RecommendResult, ResultRow, read_results
from sda_fast.recommend.run import recommend

__all__ = ["RecommendConfig", "RecommendResult", "ResultRow", "read_results", "recommend"]
