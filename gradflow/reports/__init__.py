"""Pages that can be sent to a colleague: a study, a sweep or a run as one file of HTML that needs nothing else.

They compute nothing: numbers come from the data set, tables and figures from the rooms `tables` and `plot`.
"""

from gradflow.reports._report import report as report
from gradflow.reports._run import fragment as fragment
from gradflow.reports._site import site as site
