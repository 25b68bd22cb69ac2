"""One page with tables and pictures from the other jobs' results."""

from sda_fast.report.config import ReportConfig
from sda_fast.report.tables import Table, gains_table, groups_table, metrics_table
from sda_fast.report.write import write_report

__all__ = ["ReportConfig", "Table", "gains_table", "groups_table", "metrics_table", "write_report"]
