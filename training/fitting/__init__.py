"""Fitting of avatars to tracked images: arguments, optimization, density control, queue, report."""
