@setup_workload begin
    x = rand(Xoshiro(0), Float32, 4, 12)
    y = onehotbatch(repeat(0:2, 4), 0:2)
    @compile_workload begin
        for widths in ((4, 5, 3), (4, 5, 5, 3))
            layers = [PrunableDense(i => o, o == 3 ? identity : NNlib.relu) for (i, o) in zip(widths, widths[2:end])]
            model = Chain(layers...)
            iterative_prune!(model, (x, y), (x, y); schedule = [0.2, 0.5], training = Training(epochs = 1, batchsize = 5))
            sprint(show, MIME("text/plain"), model)
        end
        prunable(Chain(Dense(4 => 5, NNlib.relu), Dense(5 => 3)))
    end
end
