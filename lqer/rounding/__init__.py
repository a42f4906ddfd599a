"""Which of a number format's values each weight takes. This folder imports torch and lqer.formats only."""
