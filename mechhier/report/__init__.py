"""Figures, attention views and the HTML report of a result."""

from mechhier.report.attention import AttentionView, attention_heads, show_attention
from mechhier.report.figures import plot, plot_loss
from mechhier.report.html import Report, Section, write_report
from mechhier.report.reading import by_phenomenon

__all__ = [
    "AttentionView",
    "Report",
    "Section",
    "attention_heads",
    "by_phenomenon",
    "plot",
    "plot_loss",
    "show_attention",
    "write_report",
]
