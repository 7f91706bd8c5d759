"""Everything from nothing by one recipe: `pointillist train`."""
