"""
    sensitivity(model, data; saliency = Magnitude(), rates = [0.1:0.1:0.9; 0.95; 0.99]) -> Vector of named tuples

What pruning a single layer does: for each prunable layer and each rate the `accuracy` and `loss` on `data`, a pair `(x, y)`,
of a copy in which that layer alone is pruned to that rate: a Tables.jl table with the columns `layer`, `rate`, `accuracy`,
`loss`. Rate 0, the model as it is, comes first for each layer. [`tolerable_rates`](@ref) turns it into rates for
[`Layerwise`](@ref).
"""
function sensitivity(model, data; saliency = Magnitude(), rates = [0.1:0.1:0.9; 0.95; 0.99])
    n = length(prunables(model))
    return [begin
        copy = deepcopy(model)
        structure = Layerwise(exclude = setdiff(1:n, layer))
        rate == 0 || prune!(copy, saliency, data; sparsity = rate, structure)
        (; layer, rate = Float64(rate), reverse(evaluate(copy, data))...)
    end for layer in 1:n for rate in [0; rates]]
end

"""
    tolerable_rates(table; loss = 0.01) -> Vector

For each layer of what [`sensitivity`](@ref) returns the highest rate up to which the accuracy stays within `loss` of
that at rate 0.

# Examples
```jldoctest
julia> x = rand(Float32, 2, 256); y = Flux.onehotbatch(x[1, :] .> x[2, :], (true, false));

julia> model = Chain(PrunableDense(2 => 16, relu), PrunableDense(16 => 2));

julia> length(tolerable_rates(sensitivity(model, (x, y)); loss = 0.02))
2
```
"""
function tolerable_rates(table; loss = 0.01)
    return map(unique(row.layer for row in table)) do layer
        rows = sort!(filter(row -> row.layer == layer, table); by = row -> row.rate)
        good = Iterators.takewhile(row -> row.accuracy >= first(rows).accuracy - loss, rows)
        maximum(row -> row.rate, good)
    end
end
