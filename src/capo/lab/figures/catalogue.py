"""All figures, in an order in which those that share runs come after those that make them."""

from __future__ import annotations

from capo.lab.figures import accuracy, costs, rivals, tasks, warning
from capo.lab.figures.figure import FigureOf

FIGURES: tuple[FigureOf, ...] = (
    FigureOf(
        "fig1", "Conservative against aggressive, with and without CAPO (Fig. 1, 2)", accuracy.fig1
    ),
    FigureOf(
        "fig3", "m_F and m_H over training; the warning before a collapse (Fig. 3)", warning.fig3
    ),
    FigureOf("fig5", "Rejection rate over training (Fig. 5)", accuracy.fig5),
    FigureOf("fig6", "Tokens judged by an SGD or an Adam step (Fig. 6)", accuracy.fig6),
    FigureOf("fig7", "The PPO clip (Fig. 7)", accuracy.fig7),
    FigureOf("fig8", "KL penalty and gradient norms (Fig. 8)", accuracy.fig8),
    FigureOf("table1", "What a step costs (Table 1)", costs.table1),
    FigureOf("table5", "m_F and the true KL of a step (Table 5)", costs.table5),
    FigureOf("selections", "Hard, soft, budgeted and self-found thresholds", accuracy.compared),
    FigureOf("thresholds", "The threshold over orders of magnitude", accuracy.thresholds),
    FigureOf("proxies", "The last-layer model against cheaper proxies", accuracy.compared),
    FigureOf("rivals", "Rivals under identical aggressive conditions", rivals.rivals),
    FigureOf("map", "Where token masks help, and where they do not", accuracy.mapped),
    FigureOf("tasks", "The same settings on eleven tasks and architectures", tasks.tasks),
)
