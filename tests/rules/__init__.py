"""Every rule against an independent reference in float64, written from the formula."""
