"""report.html: one self-contained file for a run or for a collection of runs, readable offline and on a phone.

points.py     the candidates of runs and the measures that compare them
charts.py     the charts as plotly reads them; colours that depend on the scheme are left to the page
write.py      fills page.html, which holds page.css, page.js and plotly's own javascript
"""
