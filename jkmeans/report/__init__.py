"""Reports: the pictures of a run as PNG files, and its page, one HTML file that needs nothing else.

`kmeans.py` draws those of a k-means job. No module imports matplotlib before it draws.
"""

from jkmeans.report.page import write_page
from jkmeans.report.pictures import write_report

__all__ = ["write_page", "write_report"]
