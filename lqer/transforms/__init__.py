"""In which basis, scale or range a weight is rounded. This folder imports torch and lqer.formats only."""
