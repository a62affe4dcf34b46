"""What all pages and pictures share: one self-contained HTML file each, in light and dark; figures as SVG and PNG."""
