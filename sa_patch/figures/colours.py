"""The colour of each method, the same in every figure of the package.

The Okabe-Ito set, told apart by colour-blind readers; compositions take the others.
"""

COLOURS = {
    "sa": "#0072B2",
    "swa": "#D55E00",
    "moba": "#009E73",
    "psa": "#56B4E9",
    "block_topk": "#CC79A7",
}
# For compositions: told apart from the above and, where there are many, by their markers too.
OTHER_COLOURS = (
    "#E69F00", "#882255", "#332288", "#7F7F7F", "#999933", "#661100", "#44AA99", "#AA4499",
)  # fmt: skip
FULL_COLOUR = "#000000"
