"""How much would be lost if a block were not computed exactly? Query centroids against all true keys.

For the centroid of query block i, s_t = scale qc_i.k_t, sbar_j = scale qc_i.kc_j, key block j of n_j tokens:

    m_ij   = max_t s_t
    lse_ij = log sum_{t in j} exp(s_t)
    gap_ij = lse_ij - log n_j - sbar_ij                      (>= 0, Jensen)

Routing "svg_ear" (arXiv 2603.08982 and its released code): the error token by token,

    E_ij = sum_t |exp(s_t) v_t - exp(sbar_ij) vc_j|^2
         = sum_t e_t^2 |v_t - vc_j|^2 + 2 e_t (e_t - ebar) <v_t - vc_j, vc_j> + (e_t - ebar)^2 |vc_j|^2

with e_t = exp(s_t), ebar = exp(sbar_ij). Written with centred values it does not cancel, and values are only
read through three scalars per token. E is comparable inside a row i only, whose largest m is taken off.

Routing "output_error": the error of the block's contribution to the output, as a vector, so that errors of
tokens may cancel as they do in the output. A centroid that is given the Jensen gap carries exactly the mass
exp(lse_ij) at the query centroid, so what is lost is

    e_ij = |sum_t exp(s_t) v_t - exp(lse_ij) vc_j| / Z_i = |sum_t exp(s_t) (v_t - vc_j)| / Z_i
    Z_i  = sum_j exp(lse_ij)                                 (all valid keys: exact at the query centroid)

Being normalised it is comparable across rows and heads. In both, `error` is the log of the squared error per
exactly computed key, log E_ij - log n_j: the number of queries, |Q_i|, is a factor of gain and cost alike.

Routing "mass" (SVG2, arXiv 2505.18875) looks at centroids only: error is the mass log n_j + sbar_ij itself,
and no key is read.

All exponentials are taken below the block's own maximum: logits of any size neither overflow nor vanish.
"""
